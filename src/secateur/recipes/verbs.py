"""The verbs: name, summary, recipe and function. Imports nothing slow, so that `--help` is instant.

The core has most verbs. Packages of `APART` have one each, and nothing of the core imports them:
without the package there is no such verb. A verb of somebody else's package is an entry point:

    [project.entry-points."secateur.verbs"]
    shear = "package:VERB"          # fields of `Verb`

Entry points are read only for a word that is no verb here, because that takes as long as `--help`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import RecipeError
from secateur.parallel.launched import Launched
from secateur.progress import Progress, Silent

if TYPE_CHECKING:
    from secateur.parallel.ranks import Ranks

Showing = Callable[[], AbstractContextManager[Progress]]
"""Makes what shows the progress, in the process that shows it."""

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
            a progress and the options of the call; with `ranks`, several processes share its work.
            Its docstring is that of the Python function.
        plan: the place of the function for a dry run, which takes the same.
        function: the place of the Python function, if `step` alone does not make it.
        more: further sentences for the help of the verb.
        streams: whether it prints by itself; its step then takes `as_json` instead of a progress.
        only_command: whether there is no Python function.
        after: the verb of the core that `secateur --help` lists before it.
    """

    name: str
    stage: str
    summary: str
    recipe: str
    step: str
    plan: str = ""
    function: str = ""
    more: str = ""
    streams: bool = False
    only_command: bool = False
    after: str = ""

    @property
    def python(self) -> str:
        """The name of the function: that of the verb, unless Python has that word itself."""
        return f"{self.name}_model" if iskeyword(self.name) else self.name

    @property
    def in_python(self) -> bool:
        """Whether there is a Python function."""
        return bool(self.function) or not (self.streams or self.only_command)

    def run(
        self, recipe: Any, call: Mapping[str, Any], showing: Showing, *, command: bool = False
    ) -> Any:
        """Carry out a recipe, or plan it only.

        The first process does everything that one process does: it checks the recipe, opens the
        folder, and writes the result. The others do the `share` of the step, or the same function.
        They wait until the first one sends them something, so whatever it refuses is refused before
        any work. An error of one process ends all.

        Args:
            recipe: its recipe; all processes have the same.
            call: the options of the call.
            showing: makes what shows the progress, in the first process.
            command: whether it is a command, which the launched processes share. A function in
                Python works alone, unless all of them call it.

        Returns:
            The result. A command has none in a process that is not the first.

        Raises:
            SecateurError: what, where, and what to do.
        """
        options = dict(call)
        together = command and "WORLD_SIZE" in os.environ
        launched = Launched.read(os.environ) if together else Launched()
        if launched.count > 1:  # torch would print the stack of every connection that closes
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        step, dry_run = imported(self.step), options.pop("dry_run", False)
        share, ranks = _share_of(step), None
        if launched.count > 1 and (dry_run or share is None):
            words = f"secateur {self.name}{' --dry-run' * dry_run}"
            raise RecipeError(
                f"`{words}` works in one process only, and there are {launched.count}",
                remedy="start it without torchrun",
            )
        if self.streams:  # it prints while it works, so there is no progress to show
            return step(recipe, **options)
        if dry_run:
            with showing() as progress:
                return imported(self.plan)(recipe, progress, options)
        cluster = getattr(recipe, "cluster", None)
        if cluster is not None and cluster.ray is not None:
            return self._run_on_ray(recipe, call, showing)
        work = step
        if hasattr(step, "caller"):  # a class for the runner
            work = partial(imported("secateur.steps.runner:carry_out"), step)
            ranks = None if command else step.caller(recipe)
        if launched.count > 1:
            ranks = imported("secateur.parallel.processes:joined")(recipe.device)
        with ranks or nullcontext():
            if ranks and not ranks.first:
                made = share and share(recipe, ranks)
                return None if command else made
            with showing() as progress:
                return work(recipe, progress, **options, **({"ranks": ranks} if ranks else {}))

    def _run_on_ray(self, recipe: Any, call: Mapping[str, Any], showing: Showing) -> Any:
        """Carry out a recipe in processes that Ray starts. All machines see its files."""
        from secateur.parallel.ray_launcher import launch
        from secateur.runs.environment import choose_device

        cluster = recipe.cluster
        on_gpu = recipe.device != "cpu" and choose_device(recipe.device).type == "cuda"
        # in the processes nothing is left to start, and the result names no cluster
        own = recipe.model_copy(update={"cluster": type(cluster)()})
        launch(
            cluster.ray,
            cluster.processes,
            on_gpu,
            partial(self.run, own, dict(call), showing, command=True),
        )
        return imported(self.step).result(Path(recipe.output).absolute())


def _share_of(step: Any) -> Callable[[Any, Ranks], Any] | None:
    """What a process does that is not the first; None if a step works in one process."""
    if isinstance(step, type):
        share: Callable[[Any, Ranks], Any] | None = getattr(step, "share", None)
        return share
    if "ranks" not in signature(step).parameters:
        return None
    return lambda recipe, ranks: step(recipe, Silent(), ranks=ranks)


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
            plan="secateur.steps.prune:plan_recipe",
            function="secateur.steps.prune:prune",
        ),
        Verb(
            "structure",
            MAKE,
            "Cut layers, heads, neurons, channels or experts: a smaller and faster model in every "
            "engine.",
            "secateur.recipes.structure:StructureRecipe",
            step="secateur.steps.structure:CutStructure",
            plan="secateur.steps.structure:plan_structure",
        ),
        Verb(
            "train",
            MAKE,
            "Train a pruned or cut model, on text or with a larger model as its teacher. Zeros "
            "stay zero.",
            "secateur.recipes.train:TrainRecipe",
            step="secateur.steps.train:Train",
            plan="secateur.steps.train:plan_training",
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
            step="secateur.steps.methods:list_methods",
            function="secateur.steps.methods:methods",
        ),
        Verb(
            "demo",
            MAKE,
            "Prune SmolLM2-135M, pack, time and judge it beside the dense model; write a report.",
            "secateur.recipes.prune:DemoRecipe",
            step="secateur.steps.demo:run_demo",
            only_command=True,
        ),
        Verb(
            "generate",
            RUN,
            "Continue a prompt, or answer one message, on the CPU. Packed layers stay packed.",
            "secateur.recipes.deploy:GenerateRecipe",
            function="secateur.steps.generate:generate",
            step="secateur.cli.commands:carry_out_generate",
            streams=True,
        ),
        Verb(
            "chat",
            RUN,
            "Talk to a model in the terminal.",
            "secateur.recipes.deploy:ChatRecipe",
            step="secateur.cli.commands:carry_out_chat",
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
            function="secateur.steps.evaluate:evaluate",
            more="Every number comes with the id of its protocol. Numbers with different ids "
            "cannot be compared. A run folder keeps the results in secateur/evaluation.json, "
            "beside those of other protocols.",
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
            step="secateur.steps.inspect:inspect_recipe",
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
