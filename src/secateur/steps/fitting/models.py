"""Makes models whose linears are stored in given formats, and measures them.

A run prunes and another one rounds. Both go through the layers in order, so every linear is fitted
to the inputs that it has in the model that is made. The same options, as steps of a chain, are the
recipe of the winner.

A level is such a model with one format for all linears. All levels of one sparsity share the pruned
model. The error of a linear on a level is the sum of the squared errors of pruning and of rounding,
both relative to the squared outputs.

Divergence that chooses is measured on other windows than those that made the levels.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.search.candidate_evaluator import CandidateEvaluator, FitnessCache
from secateur.engine.search.stored_levels import Level, StoredVariants
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled, Progress
from secateur.recipes.compress import CompressRecipe, FitRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.runtime.load import load
from secateur.runtime.storage_plan import ChosenValues, PackableCheckpoint
from secateur.steps.compress import BITS, output_errors, pack_model, round_checkpoint
from secateur.steps.fitting.context import FitContext
from secateur.steps.fitting.storage_formats import StorageFormat
from secateur.steps.runner import carry_out, step_of

Formats = Mapping[str, StorageFormat]
"""How every linear is stored, by its name."""


def make_levels(context: FitContext) -> Iterator[Level]:
    """Make every level, or reuse what an earlier run has made."""
    dense, work = context.source.folder, context.work
    for level in context.costs.levels:
        formats = dict.fromkeys(context.model.linears, level)
        label = Labelled(context.progress, f"{level.sparsity:.0%} zeros")
        with context.time.phase("prune"):
            sparse = _prune(context, dense, formats, work / f"pruned-{level.sparsity:g}", label)
        label = Labelled(context.progress, level.name)
        output = work / f"{level.values}-{level.sparsity:g}"
        with context.time.phase("round"):
            folder = _round(context, context.model.copy_in(sparse), formats, output, label)
        made_model = context.model.copy_in(folder)
        errors: dict[str, float] = {}
        for made in sorted({sparse, folder} - {dense}):
            for name, error in output_errors(made).items():
                errors[name] = errors.get(name, 0.0) + error
        sizes = bytes_of_linears(made_model, formats)
        yield Level(
            level.name, made_model.reader, sizes, errors, level.rounded_inputs, level.family
        )


def bytes_of_linears(model: PackableCheckpoint, formats: Formats) -> dict[str, int]:
    """Bytes of every linear when it is packed, by its name."""
    sizes = model.packed_bytes(lambda name: [formats[name].values])
    return {name: size for name, (size,) in sizes.items()}


def make_model(
    context: FitContext,
    model: PackableCheckpoint,
    formats: Formats,
    output: Path,
    progress: Progress,
) -> tuple[Path, PackableCheckpoint]:
    """Prune and round a model, unless an earlier run has.

    Args:
        context: of the fit.
        model: the source, or a cut of it.
        formats: of every linear.
        output: folder of the results.
        progress: receives the steps.

    Returns:
        The folder before rounding, and the model: the source where nothing is pruned or rounded.
    """
    output.mkdir(parents=True, exist_ok=True)
    pruning, rounding = Labelled(progress, "pruning"), Labelled(progress, "rounding")
    sparse = _prune(context, model.reader.folder, formats, output / "pruned", pruning)
    pruned = model.copy_in(sparse)
    folder = _round(context, pruned, formats, output / "rounded", rounding)
    return sparse, model.copy_in(folder)


def _prune(
    context: FitContext, source: Path, formats: Formats, output: Path, progress: Progress
) -> Path:
    options = _prune_options(context.recipe, formats, str(context.calibration_file))
    if options is None:
        return source
    if not output.exists():
        recipe = build_recipe(PruneRecipe, {**options, **paths(context.recipe, source, output)})
        carry_out(step_of("prune"), recipe, progress, resume=True)
    return output


def _round(
    context: FitContext,
    source: PackableCheckpoint,
    formats: Formats,
    output: Path,
    progress: Progress,
) -> Path:
    folder = source.reader.folder
    options = _compress_options(context.recipe, formats, str(context.calibration_file))
    if "calibration" not in options:
        return folder
    recipe = build_recipe(CompressRecipe, {**options, **paths(context.recipe, folder, output)})
    return round_checkpoint(recipe, source, output, progress)


def chosen_values(
    recipe: FitRecipe, folder: Path, formats: Formats, rounding: dict[str, Any] | None = None
) -> ChosenValues:
    """What is packed of a model that was made; `rounding` is the record of its rounding."""
    model = PackableCheckpoint.open(folder, trust_remote_code=recipe.trust_remote_code)
    values = {name: formats[linear].values for linear, name in model.linears.items()}
    return ChosenValues(model, values, rounding or {})


def packing_recipe(recipe: FitRecipe, formats: Formats) -> CompressRecipe:
    """The recipe that packs a model with these formats."""
    options = _compress_options(recipe, formats, "")
    packing = {key: options[key] for key in ("values", "overrides", "embeddings")}
    return build_recipe(CompressRecipe, {**packing, "model": recipe.model, "output": recipe.output})


def chain_steps(recipe: FitRecipe, formats: Formats, text: str) -> list[dict[str, Any]]:
    """The steps of a chain that make and pack a model with these formats."""
    prune = _prune_options(recipe, formats, text)
    compress = {"compress": _compress_options(recipe, formats, text)}
    return [compress] if prune is None else [{"prune": prune}, compress]


def _prune_options(recipe: FitRecipe, formats: Formats, text: str) -> dict[str, Any] | None:
    """The options of `prune` that give every linear its sparsity; None if there are no zeros."""
    wanted = {name: stored.sparsity for name, stored in formats.items()}
    if not any(wanted.values()):
        return None
    same = len(set(wanted.values())) == 1
    return {
        "effort": recipe.effort,
        "allocation": "uniform",  # the search has chosen
        "sparsity": max(wanted.values()) if same else 0.0,
        "overrides": {} if same else {name: share for name, share in wanted.items() if share},
        "calibration": {"source": text},
        **shared_options(recipe),
    }


def _compress_options(recipe: FitRecipe, formats: Formats, text: str) -> dict[str, Any]:
    """The options of `compress` that give every linear its values."""
    wanted = {name: stored.values for name, stored in formats.items()}
    common = Counter(wanted.values()).most_common(1)[0][0]
    options: dict[str, Any] = {
        "values": common,
        "overrides": {name: values for name, values in wanted.items() if values != common},
        "embeddings": "int8",
    }
    if BITS.keys() & wanted.values():
        options |= {"calibration": {"source": text}, **shared_options(recipe)}
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

    The models may have other layers and widths than the dense one, but its vocabulary. What was
    measured is kept in a file.

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

    def divergence(self, folder: Path) -> float:
        """The divergence of a model as it is, which is not packed."""
        device, trust = self.context.target.device, self.context.recipe.trust_remote_code
        target = CheckpointTarget(CheckpointReader(folder), None, device, trust_remote_code=trust)
        evaluator = self._evaluator(target, self.dense)
        versions = ("dense",) * len(target.layers)
        rows = range(len(self.windows))
        return self._once(folder, lambda: evaluator.fitness([versions], rows)[0])

    def packed(self, sparse: Path, folder: Path, formats: Formats) -> tuple[Path, float]:
        """Pack a model that was made, and measure it as it runs.

        Args:
            sparse: the model before rounding.
            folder: the model.
            formats: how every linear is stored.

        Returns:
            The packed folder and its divergence.
        """
        output = self.context.work / "packed" / self._name_of(folder)
        if not output.exists():
            unfinished = output.with_name(f"{output.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            chosen = chosen_values(self.context.recipe, folder, formats)
            source = replace(self.context.source, folder=sparse)
            recipe = packing_recipe(self.context.recipe, formats)
            pack_model(unfinished, recipe, source, chosen, self.context.progress)
            unfinished.rename(output)
        return output, self._once(output, lambda: self._running(output))

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

    def _once(self, folder: Path, measure: Callable[[], float]) -> float:
        """A value of a model, from the file or else measured."""
        name = self._name_of(folder)
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
        outer = EmbeddingAndHead(target, self.windows)
        variants = StoredVariants(outer, (), ())
        return CandidateEvaluator(outer, variants, "divergence", self.context.progress, dense)
