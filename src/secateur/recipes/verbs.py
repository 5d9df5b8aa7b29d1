"""The verbs: name, summary, recipe and function. Imports nothing slow, so that `--help` is instant.

The core has most verbs. Packages of `APART` have one each, and nothing of the core imports them:
without the package there is no such verb. A verb of somebody else's package is an entry point:

    [project.entry-points."secateur.verbs"]
    shear = "package:VERB"          # fields of `Verb`

Entry points are read only for a word that is no verb here, because that takes as long as `--help`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from secateur.errors import RecipeError

MAKE, RUN, MEASURE, PUBLISH = STAGES = (
    "Make a smaller model",
    "Run a model",
    "Measure a model",
    "Publish a model",
)
"""The headings of `secateur --help`."""

APART = ("secateur.serving", "secateur.advisor", "secateur.report_page", "secateur.publishing")
"""Packages that may be missing. Each has the fields of its verb in `VERB`."""


@dataclass(frozen=True)
class Verb:
    """One verb of the command line, and its function in Python.

    Attributes:
        name: the name on the command line.
        stage: the heading that lists it.
        summary: one sentence for the list of verbs.
        recipe: the place of its recipe class, `package.module:name`.
        step: the place of its step: a class for the runner, or a function that takes the recipe,
            a progress and the options of the call. Its docstring is that of the Python function.
        plan: the place of the function for a dry run, which takes the same.
        worker: the place of what other processes do, which share the work of this one; takes the
            recipe and the processes.
        function: the place of the Python function, if `step` alone does not make it.
        command: the place of what the command does, if it does more than to run the step; takes
            the recipe and the options of the call.
        more: further sentences for the help of the verb.
        together: whether several processes, started by torchrun, can share its work.
        streams: whether it prints by itself; its step then takes `as_json` instead of a progress.
        after: the verb of the core that `secateur --help` lists before it.
    """

    name: str
    stage: str
    summary: str
    recipe: str
    step: str = ""
    plan: str = ""
    worker: str = ""
    function: str = ""
    command: str = ""
    more: str = ""
    together: bool = False
    streams: bool = False
    after: str = ""

    @property
    def python(self) -> str:
        """The name of the function: that of the verb, unless Python has that word itself."""
        return f"{self.name}_model" if iskeyword(self.name) else self.name

    @property
    def in_python(self) -> bool:
        """Whether there is a Python function."""
        return bool(self.function or self.step) and self.name not in ("demo", "serve")

    def carry_out(self, recipe: Any, call: Mapping[str, Any], progress: Any, **ranks: Any) -> Any:
        """Carry out a recipe, or plan it only.

        Args:
            recipe: the recipe.
            call: the options of the call.
            progress: receives every step.
            **ranks: the processes that share the work, if there are several.
        """
        options = dict(call)
        if options.pop("dry_run", False):
            return imported(self.plan)(recipe, progress, options)
        step = imported(self.step)
        if isinstance(step, type):
            return imported("secateur.steps.runner:carry_out")(
                step, recipe, progress, **options, **ranks
            )
        return step(recipe, progress, **options, **ranks)

    @property
    def about(self) -> str:
        """The summary and the further sentences."""
        return f"{self.summary}\n\n{self.more}" if self.more else self.summary


def imported(place: str) -> Any:
    """Import and return the object at `package.module:name`.

    Raises:
        RecipeError: it is in a package of `APART` that is missing.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in APART:
            raise
        raise RecipeError(
            f"this needs {error.name}, which is not installed",
            remedy="install the whole package: pip install secateur-llm",
        ) from error


def _with_apart(*core: Verb) -> list[Verb]:
    """The verbs of the core and of the packages that are there, in the order of `--help`."""
    found = list(core)
    for package in APART:
        try:
            verb = Verb(**importlib.import_module(package).VERB)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
        else:
            found.insert(1 + [each.name for each in found].index(verb.after), verb)
    return found


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in _with_apart(
        Verb(
            "prune",
            MAKE,
            "Prune a model into a new folder that plain transformers loads.",
            "secateur.recipes.prune:PruneRecipe",
            step="secateur.steps.prune:Prune",
            plan="secateur.steps.plan_prune:plan_recipe",
            function="secateur.steps.prune:prune",
            command="secateur.cli.commands:carry_out_prune",
            together=True,
        ),
        Verb(
            "structure",
            MAKE,
            "Cut layers, heads, neurons, channels or experts: a smaller and faster model in every "
            "engine.",
            "secateur.recipes.structure:StructureRecipe",
            step="secateur.steps.structure:CutStructure",
            plan="secateur.steps.structure:plan_structure",
            worker="secateur.structured.choices:run_worker",
            together=True,
        ),
        Verb(
            "train",
            MAKE,
            "Train a pruned or cut model, on text or with a larger model as its teacher. Zeros "
            "stay zero.",
            "secateur.recipes.train:TrainRecipe",
            step="secateur.steps.train:Train",
            plan="secateur.steps.train:plan_training",
            together=True,
        ),
        Verb(
            "compress",
            MAKE,
            "Store a pruned model without its zeros.",
            "secateur.recipes.compress:CompressRecipe",
            step="secateur.steps.compress:Compress",
        ),
        Verb(
            "fit",
            MAKE,
            "Find and make the best compressed model within a size, memory, speed or loss.",
            "secateur.recipes.compress:FitRecipe",
            step="secateur.steps.fit:Fit",
            plan="secateur.steps.fit:plan_fit",
            more="The exit code is 3 if the made model breaks a bound.",
        ),
        Verb(
            "draft",
            MAKE,
            "Find and make a draft of a model: it decodes faster with it, and its text stays the "
            "same.",
            "secateur.recipes.draft:DraftRecipe",
            step="secateur.steps.draft:Draft",
            plan="secateur.steps.draft:plan_draft",
            more="The exit code is 3 if no draft pays on this machine.",
        ),
        Verb(
            "chain",
            MAKE,
            "Cut, prune, train and compress in one run, with one account of what is left.",
            "secateur.recipes.prune:ChainRecipe",
            step="secateur.steps.chain:ChainSteps",
            plan="secateur.steps.chain:plan_chain",
        ),
        Verb(
            "import",
            MAKE,
            "Make an ordinary folder from what another tool wrote: compressed-tensors, masks, "
            "adapters.",
            "secateur.recipes.deploy:ImportRecipe",
            step="secateur.steps.import_model:ImportModel",
            more="The kind of source is recognised. In Python: secateur.import_model.",
        ),
        Verb(
            "decompress",
            MAKE,
            "Write a compressed model as plain dense safetensors again.",
            "secateur.recipes.compress:DecompressRecipe",
            step="secateur.steps.unpack:Decompress",
        ),
        Verb(
            "methods",
            MAKE,
            "List presets, methods and their parts.",
            "secateur.recipes.prune:MethodsRecipe",
            command="secateur.cli.commands:carry_out_methods",
        ),
        Verb(
            "demo",
            MAKE,
            "Prune SmolLM2-135M, pack, time and judge it beside the dense model; write a report.",
            "secateur.recipes.prune:DemoRecipe",
            step="secateur.steps.demo:run_demo",
        ),
        Verb(
            "generate",
            RUN,
            "Continue a prompt, or answer one message, on the CPU. Packed layers stay packed.",
            "secateur.recipes.deploy:GenerateRecipe",
            function="secateur.steps.generate:generate",
            command="secateur.cli.commands:carry_out_generate",
            streams=True,
        ),
        Verb(
            "chat",
            RUN,
            "Talk to a model in the terminal.",
            "secateur.recipes.deploy:ChatRecipe",
            command="secateur.cli.commands:carry_out_chat",
            more="/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an "
            "answer. Without a terminal every line of stdin is a message.",
            streams=True,
        ),
        Verb(
            "evaluate",
            MEASURE,
            "Measure a model: perplexity, divergence from the dense model, tasks and texts.",
            "secateur.recipes.measure:EvaluateRecipe",
            step="secateur.steps.evaluate:run_evaluation",
            worker="secateur.steps.evaluate:run_worker",
            function="secateur.steps.evaluate:evaluate",
            more="Every number comes with the id of its protocol. Numbers with different ids "
            "cannot be compared. A run folder keeps the results in secateur/evaluation.json, "
            "beside those of other protocols.",
            together=True,
        ),
        Verb(
            "bench",
            MEASURE,
            "Measure speed and memory at batch 1 on the CPU; ways to run are interleaved.",
            "secateur.recipes.measure:BenchRecipe",
            step="secateur.steps.bench:bench_recipe",
        ),
        Verb(
            "inspect",
            MEASURE,
            "Show family, sizes, linear layers and the sparsity that is really stored.",
            "secateur.recipes.measure:InspectRecipe",
            function="secateur.steps.inspect:inspect",
            command="secateur.cli.commands:carry_out_inspect",
        ),
        Verb(
            "diagnose",
            MEASURE,
            "Check zeros, values, units and layers.",
            "secateur.recipes.measure:DiagnoseRecipe",
            step="secateur.steps.diagnose:run_diagnosis",
            more="The exit code is 3 if something is proven wrong.",
        ),
        Verb(
            "sweep",
            MEASURE,
            "Prune at many sparsities, evaluate each model and draw the curves.",
            "secateur.recipes.measure:SweepRecipe",
            step="secateur.steps.sweep:SweepPoints",
        ),
        Verb(
            "export",
            PUBLISH,
            "Write a model for another engine: llama.cpp, vLLM, ONNX Runtime, OpenVINO, torch.",
            "secateur.recipes.deploy:ExportRecipe",
            step="secateur.steps.export:Export",
        ),
    )
}
"""All verbs, in the order of `secateur --help`."""


def look_for(name: str) -> None:
    """Add a verb of an installed package to the verbs, if there is one of this name."""
    from importlib.metadata import entry_points

    for plug_in in entry_points(group="secateur.verbs", name=name):
        VERBS[name] = Verb(**plug_in.load())
