"""Compresses a pruned checkpoint: the files no longer store its zeros.

There are two passes over the source, with one matrix in memory. The first pass counts zeros and
chooses the smallest layout for each matrix, so all sizes are known. The second pass packs and
writes. The result is read again and verified before the folder gets its final name. With
calibration text, a resumable run first moves the weights to int8 grids (`rounding`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.engine.prune.tasks import last_match
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import read_config
from secateur.models.opening import refuse_quantized
from secateur.models.sources import LocalCheckpoint
from secateur.progress import Progress, listener
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.registry import did_you_mean
from secateur.reporting.cards import compression_card
from secateur.reporting.models import CompressResult, stored_as
from secateur.runs.atomic import write_json, write_text
from secateur.runs.folder import NOTES, file_digests
from secateur.runs.output import check_free
from secateur.runs.records import FormatTotals, read_record
from secateur.runs.records.run import BFLOAT16_BYTES
from secateur.runtime.choice import (
    DEFAULT_GROUP,
    DENSE,
    check_names,
    without_negative_zeros,
)
from secateur.runtime.formats import GRID_BITS, VALUES, Layout, formats
from secateur.runtime.packed import PackedCheckpoint, quantization_config, write_packed
from secateur.steps.checkpoint_files import COMPRESSION, carry_over
from secateur.steps.compress.rounding import (
    BITS,
    MixedChoice,
    own_values,
    round_checkpoint,
    rounding_record,
)
from secateur.steps.compress.storage_plan import (
    ChosenValues,
    PackableMatrix,
    StoragePlan,
    find_matrices,
    make_plan,
)
from secateur.steps.runner import Run, Step, carry_out

MOST_CHOICES = 4
"""How often values are chosen within a bound on the loss, at most."""


@takes_options_of(CompressRecipe)
def compress(
    model: str | Path, *, progress: Progress | None = None, **options: Any
) -> CompressResult:
    """Write a checkpoint without its zeros.

    With calibration text, int8 weights compensate each other's rounding errors (GPTQ), so the
    outputs stay closer to the source's. Without it, each weight is rounded to the nearest value.

    Args:
        model: folder, hub id, GGUF file or named sample. A model that is not pruned gains little.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        Sizes before and after.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(CompressRecipe, {"model": model}, options)
    return carry_out(Compress, recipe, listener(progress), **call)


class Compress(Step[CompressRecipe, CompressResult]):
    """Writes a checkpoint without its zeros."""

    verb = "compress"

    def __init__(self, recipe: CompressRecipe, run: Run) -> None:
        super().__init__(recipe, run)
        refuse_quantized(run.source.folder)
        self.reader = CheckpointReader(run.source.folder)
        self.matrices = find_matrices(self.reader, recipe.embeddings, recipe.trust_remote_code)

    @classmethod
    def check(cls, recipe: CompressRecipe) -> None:
        """Check everything in a recipe that does not need its model.

        Raises:
            RecipeError: a format is unknown, or options do not fit together.
        """
        bound = recipe.max_loss_increase
        grids = [values for values in recipe.overrides.values() if values in GRID_BITS]
        check_names(recipe.format, recipe.values, None if bound or grids else recipe.group_size)
        for glob, values in recipe.overrides.items():
            if values not in VALUES:
                raise RecipeError(
                    f"unknown values {values!r}",
                    where=f"override {glob!r}",
                    remedy=did_you_mean(values, [*VALUES]),
                )
        integers = BITS.keys() & [recipe.values, *recipe.overrides.values()]
        if bound is None and recipe.calibration.source is not None and not integers:
            raise RecipeError(
                "calibration text helps to round to integers, but the values are "
                f"{recipe.values!r}",
                remedy=f"add --values {', '.join(BITS)}, or leave --calibration out",
            )

    @classmethod
    def reads(cls, recipe: CompressRecipe) -> tuple[str | None, ...]:
        """The calibration text."""
        return (recipe.calibration.source,)

    def settled(self) -> dict[str, Any]:
        """Everything that affects the compressed weights."""
        return {
            **self.recipe.model_dump(mode="json", exclude={"output", "memory"}),
            "micro_batch_tokens": self.recipe.memory.micro_batch_tokens,
            "source_files": file_digests(self.reader.files, self.run.progress),
        }

    def identity(self) -> dict[str, Any]:
        """The same with calibration; a run without it is quick, and starts anew."""
        return {} if self.recipe.calibration.source is None else self.settled()

    def work(self) -> CompressResult:
        """Round the weights if there is text for it, and pack them."""
        recipe, reader, matrices, run = self.recipe, self.reader, self.matrices, self.run
        text, work = recipe.calibration.source, run.folder.work
        rounding: dict[str, Any] = {}
        values_of: Mapping[str, str] = {}
        zeros = zero_fractions(reader, matrices) if text is not None else {}
        if recipe.max_loss_increase is not None:
            choice = MixedChoice(recipe, reader, matrices, zeros, work, run.progress)
            return _pack_within(run, recipe, choice)
        if text is not None:
            rounded = work / "rounded"
            round_checkpoint(recipe, run.source.folder, zeros, rounded, run.progress)
            reader, rounding = CheckpointReader(rounded), rounding_record(rounded)
            matrices = find_matrices(reader, recipe.embeddings, recipe.trust_remote_code)
        if recipe.overrides:
            names = {matrix.linear: name for name, matrix in matrices.items() if matrix.prunable}
            own = own_values(recipe, names)
            values_of = {names[n]: v for n, v in own.items() if last_match(recipe.overrides, n)}
        return pack_into(run, recipe, ChosenValues(reader, matrices, values_of, rounding))

    @classmethod
    def result(cls, output: Path) -> CompressResult:
        """Read the result of a finished run from its notes."""
        return read_record(CompressResult, output / NOTES / COMPRESSION)


def _pack_within(run: Run, recipe: CompressRecipe, choice: MixedChoice) -> CompressResult:
    """Choose values within the bound on the loss, and pack them; then measure what was packed.

    The search only estimates the loss. If that of the packed model, and its standard error, exceed
    the bound on the same windows, the search runs again with a bound that is lower by the excess.
    """
    assert recipe.max_loss_increase is not None
    folder, source = run.folder, run.source
    bound = allowed = recipe.max_loss_increase
    for _ in range(MOST_CHOICES):
        chosen = choice.within(allowed)
        plan, packed = pack_model(folder.fresh_model(), recipe, source, chosen, choice.progress)
        excess = choice.choosing.increase(folder.model).cautious - bound
        if excess <= 0 or allowed <= 0:
            break
        allowed = max(allowed - excess, 0.0)
    found = choice.judging.increase(folder.model)
    chosen.rounding["chosen"] |= {
        "max_loss_increase": bound,
        "loss_increase": found.mean,
        "loss_increase_standard_error": found.standard_error,
        "judged_tokens": found.tokens,
    }
    return _write_report(run, recipe, chosen, packed, plan)


def pack_into(run: Run, recipe: CompressRecipe, chosen: ChosenValues) -> CompressResult:
    """Write the compressed checkpoint into the folder of a run, and verify it.

    Args:
        run: its source has the configuration and the tokenizer.
        recipe: format, values, embeddings, archive.
        chosen: the tensors.
    """
    made = run.folder.fresh_model()
    plan, packed = pack_model(made, recipe, run.source, chosen, run.progress)
    return _write_report(run, recipe, chosen, packed, plan)


def pack_model(
    made: Path,
    recipe: CompressRecipe,
    source: LocalCheckpoint,
    chosen: ChosenValues,
    progress: Progress,
) -> tuple[StoragePlan, PackedCheckpoint]:
    """Write a compressed checkpoint into an empty folder, and verify it.

    Args:
        made: the folder.
        recipe: format, values, embeddings, archive.
        source: the checkpoint whose configuration and tokenizer are taken over.
        chosen: the tensors.
        progress: receives every tensor.
    """
    reader, matrices = chosen.reader, chosen.matrices
    plan = make_plan(chosen, recipe, progress)
    files = plan.files(reader)
    check_free(sum(spec.nbytes for file in files for spec in file.tensors.values()), made)
    progress.start("packing", len(reader.entries))
    write_packed(
        made, files, _packed_tensors(reader, plan, matrices, progress), archive=recipe.archive
    )
    progress.finish()
    kept = not chosen.rounding and plan.keeps_weights(reader)
    layouts = [layout for file in files for layout in file.layouts.values()]
    config = read_config(source.folder)
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.computed).removeprefix("torch.")
    config["quantization_config"] = quantization_config(recipe.archive, layouts)
    carry_over(source.folder, made, config, same_weights=kept)
    return plan, verified(made, progress)


def zero_fractions(
    reader: CheckpointReader, matrices: dict[str, PackableMatrix]
) -> dict[str, float]:
    """The fraction of zeros of every linear, by its name."""
    found = {}
    for name, matrix in matrices.items():
        if matrix.prunable:
            weight = reader.read(name)
            found[matrix.linear] = 1 - int(weight.count_nonzero()) / weight.numel()
    return found


def _packed_tensors(
    reader: CheckpointReader,
    plan: StoragePlan,
    matrices: dict[str, PackableMatrix],
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the result, in the order of the files, and count what is lost."""
    for file in reader.files:
        for name, entry in reader.entries.items():
            if entry.file != file:
                continue
            tensor, layout = reader.read(name), plan.layout(name)
            counts = name in matrices and matrices[name].prunable
            if layout is None:
                stored = tensor.to(plan.dtypes[name])
                yield name, stored
            else:
                tensor = tensor.t() if layout.transposed else tensor
                # a cast can make zeros too
                weight = tensor if layout.integers else tensor.to(layout.dtype)
                if plan.choices[name].negative_zeros:
                    weight = without_negative_zeros(weight)
                parts = formats[layout.format].pack(weight, layout)
                owner = name.removesuffix(".weight")
                yield from ((f"{owner}.{suffix}", part) for suffix, part in parts.items())
                stored = formats[layout.format].unpack(parts, layout) if counts else tensor
            if counts:
                plan.count_loss(tensor, stored)
            progress.step(note=name)


def verified(folder: Path, progress: Progress) -> PackedCheckpoint:
    """Read all written tensors back and compare them.

    Raises:
        CheckpointError: the disk does not hold the values that were written.
    """
    packed = PackedCheckpoint(folder)
    progress.start("verifying", len(packed.specs))
    for name, _ in packed.tensors():
        progress.step(note=name)
    progress.finish()
    return packed


def _write_report(
    run: Run,
    recipe: CompressRecipe,
    chosen: ChosenValues,
    packed: PackedCheckpoint,
    plan: StoragePlan,
) -> CompressResult:
    """Write the record of the compression and the card."""
    folder, source = run.folder, run.source
    report = _make_report(chosen, packed, plan, folder.output, run.meter.started)
    write_json(folder.notes / COMPRESSION, {**report.to_json(), "source": source.name})
    place = recipe.output or folder.output
    card = compression_card(report, source.record, source.folder, place)
    write_text(folder.model / "README.md", card)
    return report


def _make_report(
    chosen: ChosenValues, packed: PackedCheckpoint, plan: StoragePlan, output: Path, begun: float
) -> CompressResult:
    """Add up the contents of the files."""
    reader, matrices = chosen.reader, chosen.matrices
    linears, embeddings = FormatTotals(), FormatTotals()
    dense = dict.fromkeys(("as here", "int8", "int4"), 0)
    by_format: dict[str, FormatTotals] = {}
    negative_zeros = 0
    for name, choice in plan.choices.items():
        layout, owner = plan.layout(name), name.removesuffix(".weight")
        parts = [name] if layout is None else [f"{owner}.{s}" for s in packed.parts_of(owner)]
        size = sum(packed.entries[part].size_bytes for part in parts)
        counted = (choice.layout.weights, choice.nonzeros, size)
        if not matrices[name].prunable:
            embeddings = embeddings.plus(*counted)
            continue
        linears = linears.plus(*counted)
        for values in dense:
            dense[values] += _dense_bytes(choice.layout, values)
        kind = stored_as(choice.layout.to_json())
        by_format[kind] = by_format.get(kind, FormatTotals()).plus(*counted)
        if layout is not None:
            negative_zeros += choice.negative_zeros
    size = sum(file.stat().st_size for file in packed.files)
    parameters = sum(e.size_bytes // e.dtype.itemsize for e in reader.entries.values())
    return CompressResult(
        output=output,
        archive=packed.archive,
        source_bytes=sum(file.stat().st_size for file in reader.files),
        bfloat16_bytes=BFLOAT16_BYTES * parameters,
        file_bytes=size,
        ratio=size / (BFLOAT16_BYTES * parameters),
        sparsity=1 - linears.nonzeros / linears.weights,
        negative_zeros=negative_zeros,
        linears=linears,
        formats=by_format,
        embeddings=embeddings,
        rounding=chosen.rounding,
        value_error=plan.value_error,
        dense_file_bytes={}
        if packed.archive
        else {values: size - linears.bytes + count for values, count in dense.items()},
        seconds=time.perf_counter() - begun,
    )


def _dense_bytes(layout: Layout, values: str) -> int:
    """The size of a matrix that stores its zeros."""
    dense = replace(layout, format=DENSE, pattern=None)
    if values != "as here":
        dense = replace(dense, values=values, group=DEFAULT_GROUP if values == "int4" else None)
    return formats[DENSE].nbytes(dense, layout.weights)
