"""Makes models whose matrices are stored in given formats, and measures them.

`secateur prune` prunes, and `secateur compress` rounds, heals and packs. Both go through the layers
in order, so every linear is fitted to the inputs that it has in the model that is made. The same
options, as steps of a chain, are the recipe of the winner. Divergence that chooses is measured on
other windows than those that made the models.

The survey, the first model and the judgement are always made. Between them, what does not fit into
the time any more is dropped: further candidates, cuts, healing. A phase is expected to take as long
as the same one took; the times are kept in a file, so a resumed run knows them too.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.documents import check_text
from secateur.calibration.run_windows import WindowReader
from secateur.engine.search.candidate_evaluator import CandidateEvaluator, FitnessCache, Unchanged
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.perplexity import LossComparison
from secateur.models.opening import refuse_quantized
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe, FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.shared import texts_of
from secateur.runs.environment import choose_device
from secateur.runs.output import write_json
from secateur.runtime.formats import BITS, GRID_BITS
from secateur.runtime.load import load
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.compress import Compress
from secateur.steps.fitting.costs import Costs
from secateur.steps.fitting.storage_formats import EMBEDDINGS, GROUP, StorageFormat, embedded
from secateur.steps.runner import carry_out, step_of

Formats = Mapping[str, StorageFormat]
"""How every linear is stored, and the embeddings, by their names."""

HEALING: Mapping[str, Any] = {"epochs": 1, "hidden": 3.0}
"""How a rounded model learns: the predictions and the last hidden states of the dense one. The text
itself it does not learn, so that a dense model which knows the text too little stays the aim."""


def open_model(recipe: FitRecipe, source: LocalCheckpoint) -> PackableCheckpoint:
    """The dense model of a recipe whose texts are there, and its matrices that can be packed."""
    for text in texts_of(recipe.calibration.source):
        check_text(text)
    refuse_quantized(source.folder)
    return PackableCheckpoint.open(source.folder, trust_remote_code=recipe.trust_remote_code)


def make_model(
    context: FitContext, formats: Formats, output: Path, progress: Progress
) -> tuple[Path, Path]:
    """Prune, round and pack a model, unless an earlier run has.

    Args:
        context: of the fit.
        formats: of every unit.
        output: folder of the results.
        progress: receives the steps.

    Returns:
        The folder before rounding, which is the source where nothing is pruned; and the packed one.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = sparse = context.source.folder
    text = str(context.calibration_file)
    options = _prune_options(context.recipe, formats, text)
    if options is not None:
        sparse = output / "pruned"
        if not sparse.exists():
            recipe = build_recipe(PruneRecipe, {**options, **paths(context.recipe, source, sparse)})
            carry_out(step_of("prune"), recipe, Labelled(progress, "pruning"), resume=True)
    options = _compress_options(context.recipe, formats, text)
    return sparse, _compress(context, sparse, options, output / "packed", progress)


def heal_model(
    context: FitContext, sparse: Path, formats: Formats, output: Path, progress: Progress
) -> Path:
    """Let a model that was made learn from the dense one, and pack it.

    Args:
        context: of the fit.
        sparse: the model before rounding.
        formats: of every unit.
        output: folder of the result.
        progress: receives the steps.

    Returns:
        The packed folder.
    """
    text, teacher = str(context.calibration_file), str(context.source.folder)
    options = _compress_options(context.recipe, formats, text, teacher)
    return _compress(context, sparse, options, output / "healed", progress)


def _compress(
    context: FitContext, source: Path, options: dict[str, Any], output: Path, progress: Progress
) -> Path:
    if not output.exists():
        recipe = build_recipe(CompressRecipe, {**options, **paths(context.recipe, source, output)})
        carry_out(_CompressBeside, recipe, Labelled(progress, "rounding"), resume=True)
    return output


class _CompressBeside(Compress):
    """Keeps the rounded checkpoint in the folder of its result. The healing run finds it there."""

    @property
    def place(self) -> Path:
        """The folder of all that is made with the same formats."""
        return self.run.folder.output.parent


def chain_steps(
    recipe: FitRecipe, formats: Formats, text: str, teacher: str | None
) -> list[dict[str, Any]]:
    """The steps of a chain that make, heal and pack a model with these formats."""
    prune = _prune_options(recipe, formats, text)
    compress = {"compress": _compress_options(recipe, formats, text, teacher)}
    return [compress] if prune is None else [{"prune": prune}, compress]


def _prune_options(recipe: FitRecipe, formats: Formats, text: str) -> dict[str, Any] | None:
    """The options of `prune` that give every linear its sparsity; None if there are no zeros."""
    wanted = {name: stored.sparsity for name, stored in formats.items() if name != EMBEDDINGS}
    if not any(wanted.values()):
        return None
    same = len(set(wanted.values())) == 1
    return {
        "effort": "fast" if recipe.effort == "fast" else "balanced",  # healing comes later
        "allocation": "uniform",  # the knapsack has chosen
        "sparsity": max(wanted.values()) if same else 0.0,
        "overrides": {} if same else {name: share for name, share in wanted.items() if share},
        "calibration": {"source": text},
        **shared_options(recipe),
    }


def _compress_options(
    recipe: FitRecipe, formats: Formats, text: str, teacher: str | None = None
) -> dict[str, Any]:
    """The options of `compress` that give every unit its values; with a teacher it heals."""
    wanted = {name: stored.values for name, stored in formats.items() if name != EMBEDDINGS}
    common = Counter(wanted.values()).most_common(1)[0][0]
    embeddings = embedded(formats[EMBEDDINGS])
    options: dict[str, Any] = {
        "values": common,
        "overrides": {name: values for name, values in wanted.items() if values != common},
        "embeddings": embeddings,
    }
    if GRID_BITS.keys() & {embeddings, *wanted.values()}:
        options["group_size"] = GROUP
    if BITS.keys() & set(wanted.values()) or embeddings in GRID_BITS or teacher:
        options |= {"calibration": {"source": text}, **shared_options(recipe)}
    if teacher:
        learning = {**HEALING, "tokens": recipe.tokens_to_heal, "teacher": teacher}
        options["distillation"] = learning
    return options


def shared_options(recipe: FitRecipe) -> dict[str, Any]:
    """The options that all runs take over."""
    memory = recipe.memory.model_dump(exclude_unset=True)
    return {"device": recipe.device, **({"memory": memory} if memory else {})}


def paths(recipe: FitRecipe, source: Path, output: Path) -> dict[str, Any]:
    """The options of a run that a chain gives once for all steps."""
    trust = recipe.trust_remote_code
    return {"model": str(source), "output": str(output), "trust_remote_code": trust}


class ModelEvaluator:
    """Measures divergences: mean KL(dense ‖ model) of the next-token probabilities, nats per token.

    What was measured is kept in a file.

    Args:
        context: of the fit.
        windows: token ids [windows, length].
        name: of the windows, for the file.
    """

    def __init__(self, context: FitContext, windows: Tensor, name: str) -> None:
        self.context, self.windows = context, windows
        self.dense = self._evaluator(context.target, None)
        file = context.work / f"measured-{name}.jsonl"
        self.values = FitnessCache(self.dense, lambda _: (), (), windows.numel(), file)

    def of_target(self, target: CheckpointTarget, name: str) -> float:
        """The divergence of an opened model, which is kept by its name."""
        evaluator = self._evaluator(target, self.dense)
        versions = (Unchanged.dense,) * len(target.layers)
        rows = range(len(self.windows))
        return self._once(name, lambda: evaluator.fitness([versions], rows)[0])

    def packed(self, folder: Path) -> float:
        """The divergence of a packed model, as it runs."""
        return self._once(self._name_of(folder), lambda: self._running(folder))

    def rise(self, folder: Path) -> float | None:
        """The cautious rise of the loss of a packed model; None where the recipe bounds none."""
        if self.context.recipe.max_loss_increase is None:
            return None
        name = f"the loss of {self._name_of(folder)}"
        return self._once(name, lambda: self.context.choosing.increase(folder).cautious)

    @torch.no_grad()
    def _running(self, folder: Path) -> float:
        """The divergence of a packed model in the kernels."""
        model = load(folder, trust_remote_code=self.context.recipe.trust_remote_code)
        self.dense.pass_dense()
        total = 0.0
        with self.dense.outside():
            for row, ids in enumerate(self.windows):
                logits = model(input_ids=ids[None]).logits[0]
                total += self.dense.measure(row)(logits.to(self.context.target.device))
        return total / len(self.windows)

    def _once(self, name: str, measure: Callable[[], float]) -> float:
        """A value of a model, from the file or else measured."""
        self.context.progress.start(f"measuring {name}", 1)
        found: float = self.values.noted(name, measure)
        self.context.progress.finish()
        return found

    def _name_of(self, folder: Path) -> str:
        """A name for a folder among the work of the run, and for the dense model."""
        work = self.context.work
        return "-".join(folder.relative_to(work).parts) if folder.is_relative_to(work) else "dense"

    def _evaluator(
        self, target: CheckpointTarget, dense: CandidateEvaluator | None
    ) -> CandidateEvaluator:
        """Passes one model, as it is, through its layers."""
        outer = EmbeddingAndHead(target, self.windows, fast=False)
        progress = self.context.progress
        return CandidateEvaluator(outer, Unchanged(outer), progress, dense)


class TimeBudget:
    """Measures phases, and says whether there is time for another.

    Args:
        minutes: for the whole fit; None for no limit.
        file: of the times of phases.
        begun: when the fit began, by the clock.
        clock: returns seconds.

    Attributes:
        dropped: what was left out for lack of time, for people.
    """

    def __init__(
        self,
        minutes: float | None,
        file: Path,
        begun: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.end = math.inf if minutes is None else begun + minutes * 60.0
        self.file, self.clock = file, clock
        self.took: dict[str, float] = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        )
        self.dropped: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase; of several with one name, the longest counts."""
        began = self.clock()
        yield
        taken = self.clock() - began
        if taken > self.took.get(name, 0.0):
            self.took[name] = taken
            write_json(self.file, self.took)

    def allows(self, what: str, phase: str) -> bool:
        """Whether there is time for something that takes as long as a phase took; if not, note it.

        A phase that was never measured takes no time.
        """
        if self.clock() + self.took.get(phase, 0.0) <= self.end:
            return True
        if what not in self.dropped:
            self.dropped.append(what)
        return False


@dataclass(frozen=True)
class FitContext:
    """What all parts of a fit share: the dense model, its calibration windows, the time.

    Attributes:
        recipe: the recipe.
        source: the dense model.
        target: its layers, one at a time.
        model: the same, and its matrices that can be packed.
        costs: what the model pays with, and how much of it.
        time: the time that is left.
        work: folder for models, windows and measured values.
        calibration_file: file of the windows that make models, and of those that heal them.
        choosing: measures packed folders on the windows that choose.
        judging: measures them on windows that judge the result.
        progress: receives every step.
    """

    recipe: FitRecipe
    source: LocalCheckpoint
    target: CheckpointTarget
    model: PackableCheckpoint
    costs: Costs
    time: TimeBudget
    work: Path
    calibration_file: Path
    choosing: LossComparison
    judging: LossComparison
    progress: Progress

    @classmethod
    def prepare(
        cls,
        recipe: FitRecipe,
        source: LocalCheckpoint,
        model: PackableCheckpoint,
        costs: Costs,
        time: TimeBudget,
        work: Path,
        progress: Progress,
    ) -> FitContext:
        """Cut the calibration text into windows, unless an earlier run has.

        Raises:
            RecipeError: there are fewer windows than purposes.
        """
        device, trust = choose_device(recipe.device), recipe.trust_remote_code
        target = CheckpointTarget(model.reader, None, device, trust_remote_code=trust)
        reader = WindowReader.of_folder(source.folder, target.model.config, trust_remote_code=trust)
        files = [work / f"{name}.safetensors" for name in ("fitted", "chosen", "judged")]
        purposes, text = "make models, choose among them and judge", str(recipe.calibration.source)
        reader.save_parts(
            text, recipe.calibration, files, purposes, progress, recipe.tokens_to_heal
        )
        choosing, judging = (
            LossComparison(target, file, progress, trust_remote_code=trust) for file in files[1:]
        )
        return cls(
            recipe, source, target, model, costs, time, work, files[0], choosing, judging, progress
        )  # fmt: skip
