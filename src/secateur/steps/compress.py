"""Compresses a pruned checkpoint: the files no longer store its zeros.

One pass over the source chooses a layout for each matrix, and a second one packs
(`runtime.storage_plan`). The result is read again and verified before the folder gets its final
name.

With calibration text, a pruning run first moves the weights to grids of integers, layer by layer.
The zeros stay the same, and the weights of a row compensate each other's rounding errors.
The result is a checkpoint of the same dtype with weights on grids.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import EXTRA
from secateur.engine.prepared import teacher_of
from secateur.engine.prune.tasks import last_match, refuse_idle_globs
from secateur.engine.rounded_head import head_gram, round_head
from secateur.errors import RecipeError
from secateur.models.block_files import BlockFiles, StoredBlocks
from secateur.models.checkpoint import INDEX_NAMES, Float32Reader, PatchedCopy, copy_others
from secateur.models.configuration import read_configuration
from secateur.models.opening import computed_dtype, refuse_quantized, write_dense
from secateur.models.targets import CheckpointTarget
from secateur.quantization.blocks import BlockGrid
from secateur.quantization.groups import GroupGrid
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.registry import did_you_mean
from secateur.reporting.cards import compression_card
from secateur.reporting.models import CompressResult, stored_as
from secateur.runs.environment import choose_device
from secateur.runs.folder import NOTES
from secateur.runs.output import check_free, whole_folder, write_json, write_text
from secateur.runs.records import BFLOAT16_BYTES, FormatTotals, Manifest, read_record
from secateur.runtime import storage_plan
from secateur.runtime.formats import (
    BITS,
    BLOCKS,
    GRID_BITS,
    VALUES,
    Layout,
    fitting,
    formats,
    stored_bytes,
)
from secateur.runtime.packed import PackedCheckpoint, quantization_config, write_packed
from secateur.runtime.storage_plan import (
    AUTO,
    DEFAULT_GROUP,
    DENSE,
    KEEP,
    LayoutChoice,
    PackableCheckpoint,
    StoragePlan,
)
from secateur.steps.runner import COMPRESSION, RunContext, Step, carry_out, identity_of, step_of

FEW_ZEROS = 0.01
"""A matrix with no larger share of zeros was not pruned."""


class Compress(Step[CompressRecipe, CompressResult]):
    """Write a checkpoint without its zeros.

    With calibration text, int8 weights compensate each other's rounding errors (GPTQ), so the
    outputs stay closer to the source's. Without it, each weight is rounded to the nearest value.
    """

    verb = "compress"

    def __init__(self, recipe: CompressRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        refuse_quantized(run.source.folder)
        self.model = self.opened(run.source.folder)
        given = recipe.overrides
        refuse_idle_globs(given.keys() - self.model.ends.keys(), [*self.model.linears])
        self.own = {
            name: fitting(last_match(given, name) or recipe.values, columns)
            for name, (_, columns) in self.model.shapes.items()
        }
        self.ends = self.model.settled_embeddings(recipe.embeddings, recipe.values)
        self.given_ends = {
            name: given[owner]
            for name in self.ends
            if (owner := name.removesuffix(".weight")) in given
        }
        self.ends |= self.given_ends
        self.refuse_lost_zeros()
        learning = recipe.distillation
        if learning.epochs:  # it is refused before any work
            teacher_of(learning, self.target(self.model), run.progress)

    def target(self, model: PackableCheckpoint) -> CheckpointTarget:
        """The layers of a model."""
        return CheckpointTarget(model.reader, None, choose_device(self.recipe.device))

    def opened(self, folder: Path) -> PackableCheckpoint:
        """A folder, and what of it is packed."""
        return PackableCheckpoint.open(folder)

    @classmethod
    def check(cls, recipe: CompressRecipe) -> None:
        """Check everything in a recipe that does not need its model.

        Raises:
            RecipeError: a format is unknown, or options do not fit together.
        """
        others = {recipe.embeddings, *recipe.overrides.values()}
        grouped = bool(GRID_BITS.keys() & others)
        all_values, group = [*VALUES, *BLOCKS], recipe.group_size
        for kind, name, known, where in (
            ("format", recipe.format, [AUTO, *formats], None),
            ("values", recipe.values, [AUTO, KEEP, *all_values], None),
            *(
                ("values", own, all_values, f"override {x!r}")
                for x, own in recipe.overrides.items()
            ),
        ):
            if name not in known:
                remedy = did_you_mean(name, known)
                raise RecipeError(f"unknown {kind} {name!r}", where=where, remedy=remedy)
        GroupGrid(4, group or DEFAULT_GROUP)  # refuses other groups
        if group is not None and not grouped and recipe.values not in GRID_BITS:
            raise RecipeError(
                f"a group size of {group} is for {', '.join(GRID_BITS)}, but the values are "
                f"{recipe.values!r}",
                remedy="add --values int4 or --embeddings int4, or leave --group-size out",
            )
        helps = recipe.distillation.epochs or recipe.embeddings in (*GRID_BITS, *BLOCKS)
        helps = helps or _rounds_linears(recipe)
        odd = {recipe.values, *others} & BITS.keys()
        if recipe.to == "gguf" and odd:
            raise RecipeError(
                "a GGUF file for llama.cpp has types of its own, and "
                f"{', '.join(sorted(odd))} is none of them",
                remedy=f"choose from {', '.join(BLOCKS)}",
            )
        if recipe.calibration.source is not None and not helps:
            raise RecipeError(
                "calibration text helps to round to integers, but the values are "
                f"{recipe.values!r}",
                remedy=f"add --values {', '.join((*BITS, *BLOCKS))}, or leave --calibration out",
            )

    @classmethod
    def reads(cls, recipe: CompressRecipe) -> tuple[str | None, ...]:
        """The calibration text, and the teacher."""
        return (recipe.calibration.source, recipe.distillation.teacher)

    @property
    def disk_bytes(self) -> int:
        """The dense models of the rounding; packing checks what it writes when it knows it."""
        recipe = self.recipe
        if recipe.calibration.source is None:
            return 0
        heals, head = recipe.distillation.epochs > 0, self.head is not None
        copies, reader = _rounds_linears(recipe) + heals * (1 + head), self.model.reader
        if not self.needs_float32:
            return reader.total_bytes * copies
        return 4 * sum(math.prod(x.shape) for x in reader.entries.values()) * (copies + 1)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Everything that affects the compressed weights."""
        return identity_of(self.recipe, (), self.model.reader.files, self.run.progress)

    def settled(self) -> dict[str, Any]:
        """The same: also a finished run without calibration must not have been another one."""
        return self.made_of

    def identity(self) -> dict[str, Any]:
        """Nothing without calibration: such a run is quick, and starts anew."""
        return {} if self.recipe.calibration.source is None else self.made_of

    def work(self) -> CompressResult:
        """Round the weights if there is text for it, and pack them."""
        recipe, model = self.recipe, self.model
        values_of, rounding = dict[str, str](), dict[str, Any]()
        if recipe.calibration.source is not None:
            model, rounding = self.rounded()
        # the others have the values of the recipe, `auto` among them
        names, given = model.linears, recipe.overrides
        values_of = {names[n]: v for n, v in self.own.items() if last_match(given, n)}
        values_of |= self.given_ends
        if recipe.to == "gguf":
            recipe = recipe.model_copy(update={"format": DENSE})
        given_dtype = computed_dtype(self.model.reader.folder)
        computed = given_dtype if recipe.values in BLOCKS else torch.bfloat16
        plan = storage_plan.make_plan(model, values_of, recipe, self.run.progress, computed)
        to_file, rounds = recipe.to == "gguf", bool(rounding)
        made = self._gguf(model, plan) if to_file else self._pack(model, plan, is_rounded=rounds)
        return self._report(model, plan, made, rounding)

    def refuse_lost_zeros(self) -> None:
        """Refuse pruned matrices in types of llama.cpp that have no exact zero.

        Raises:
            RecipeError: names the types that have one.
        """
        lossy = [name for name, values in self.own.items() if not _keeps_zeros(values)]
        fractions = self.model.zero_fractions if lossy else {}
        if pruned := [name for name in lossy if fractions[name] > FEW_ZEROS]:
            zeros = ", ".join(values for values in BLOCKS if _keeps_zeros(values))
            raise RecipeError(
                f"{len(pruned)} pruned matrices would lose their zeros: {self.own[pruned[0]]} has "
                "no exact 0",
                where=pruned[0],
                remedy=f"choose {zeros}, for these matrices by --overrides",
            )

    @property
    def needs_float32(self) -> bool:
        """Whether rounded weights are numbers of llama.cpp's types, and the source is narrower."""
        blocks = set(BLOCKS) & {*self.own.values(), *self.ends.values()}
        return bool(blocks) and any(
            entry.dtype.is_floating_point and entry.dtype.itemsize < 4
            for entry in self.model.reader.entries.values()
        )

    @property
    def head(self) -> str | None:
        """The values of the head, if it is rounded on a text."""
        head = next((x for n, x in self.ends.items() if self.model.matrices[n].head), None)
        return head if head in (*GRID_BITS, *BLOCKS) else None

    @property
    def place(self) -> Path:
        """Where rounded checkpoints are; one that is there is used."""
        return self.run.folder.work

    def rounded(self) -> tuple[PackableCheckpoint, dict[str, Any]]:
        """The model with linears and head on their grids, healed if it heals, and the record."""
        recipe, model, work = self.recipe, self.model, self.run.folder.work
        own, record = self.own, dict[str, Any]()
        if self.needs_float32:
            model = self.opened(self._in_float32())
        if _rounds_linears(recipe):
            rounds: Mapping[str, int | str] = {**BITS, **dict(zip(BLOCKS, BLOCKS, strict=True))}
            bits_of = {name: rounds[values] for name, values in own.items() if values in rounds}
            options = {"solver": "obs", "asymmetric": True, "fast_matmuls": True}
            folder = self.place / "rounded"
            self._hold_zeros(model, bits_of, options, folder)
            model, notes = self.opened(folder), folder / NOTES
            manifest = read_record(Manifest, notes / "manifest.json")
            lines = (notes / "layers.jsonl").read_text(encoding="utf-8").splitlines()
            errors = [linear["error"] for line in lines for linear in json.loads(line)["linears"]]
            record = {
                "solver": manifest.method["solver"],
                "asymmetric": manifest.method["asymmetric"],
                "calibration": manifest.calibration,
                "mean_error": sum(errors) / len(errors) if errors else 0.0,
                "seconds": manifest.cost.seconds,
            }
        if self.head is not None:
            model, head = self.with_head(model)
            record = {**head, **record}
        learning = recipe.distillation
        if learning.epochs:
            if self.head is not None:  # linears learn with this head
                model = self.opened(self._with_embeddings(model, work / "with-head"))
            if learning.teacher is None:
                source = str(self.model.reader.folder)
                learning = learning.model_copy(update={"teacher": source})
            # Linears whose values are no integers have 0 bits: they learn too, with their zeros,
            # and on their blocks if they have any.
            bits_of = {name: BITS.get(values, 0) for name, values in own.items()}
            options = {
                "solver": "zero", "distillation": learning.model_dump(exclude_unset=True),
            }  # fmt: skip
            folder = work / "healed"
            self._hold_zeros(model, bits_of, options, folder)
            learnt = read_record(Manifest, folder / NOTES / "manifest.json")
            record |= {"calibration": learnt.calibration, "distillation": learnt.distillation}
            model = self.opened(folder)
        return model, record

    def _in_float32(self) -> Path:
        """The source in float32, which holds the numbers of every type of llama.cpp."""
        folder, source = self.place / "float32", self.model.reader.folder
        if not folder.exists():
            with whole_folder(folder) as unfinished:
                write_dense(Float32Reader(source), unfinished, self.run.progress)
                copy_others(source, unfinished, ("config.json", *INDEX_NAMES))
                config = read_configuration(source)
                config.pop("torch_dtype", None)
                write_json(unfinished / "config.json", {**config, "dtype": "float32"})
        return folder

    def _hold_zeros(
        self,
        model: PackableCheckpoint,
        bits_of: Mapping[str, int | str],
        options: Mapping[str, Any],
        output: Path,
    ) -> None:
        """Prune what is zero already, and put linears on grids of so many bits, unless a run has.

        Args:
            model: with which the run begins.
            bits_of: bits or types of the linears that the run changes; 0 leaves a linear off
                every grid.
            options: of the run: its solver, or its distillation.
            output: folder of the run; a stopped one resumes.
        """
        if output.exists():
            return
        recipe, fractions = self.recipe, self.model.zero_fractions
        group = recipe.group_size or DEFAULT_GROUP
        how = {
            name: {"bits": bits, **({"group": group} if bits in GRID_BITS.values() else {})}
            for name, bits in bits_of.items()
            if fractions[name] < 1  # of nothing but zeros, nothing is rounded
        }
        sparsity_of = {n: x if _keeps_zeros(self.own[n]) else 0.0 for n, x in fractions.items()}
        # the method of most linears; the others are its overrides
        common = max(how.values(), key=[*how.values()].count)
        run = build_recipe(
            PruneRecipe,
            {
                **options,
                "model": str(model.reader.folder),
                "output": str(output),
                "score": "kept",
                "method_parameters": common,
                "method_overrides": {name: one for name, one in how.items() if one != common},
                "scope": "layer",
                "sparsity": 0.0,
                "include": tuple(how),
                "overrides": {name: sparsity_of[name] for name in how},
                "calibration": recipe.calibration.model_dump(exclude_unset=True),
                "memory": recipe.memory.model_dump(exclude_unset=True),
                "device": recipe.device,
                "trust_remote_code": recipe.trust_remote_code,
            },
        )
        carry_out(step_of("prune"), run, self.run.progress, resume=True)

    def with_head(self, model: PackableCheckpoint) -> tuple[PackableCheckpoint, dict[str, Any]]:
        """A model with the output head on its grid, and the record of the rounding."""
        recipe, run = self.recipe, self.run
        target, folder = self.target(model), model.reader.folder
        reader = WindowReader.of_folder(folder, target.model.config)
        windows, found = reader.read(str(recipe.calibration.source), recipe.calibration)
        # the extra windows are for the distillation alone
        windows = windows[: len(windows) - found.get(EXTRA, 0)]
        gram_of = partial(head_gram, target, windows, run.progress)
        recipe = recipe.model_copy(update={"embeddings": self.head})
        head = round_head(recipe, target, gram_of, self.place / "head", run.progress)
        mixed = replace(model, reader=storage_plan.MixedReader.of(model.reader, head))
        return mixed, {"calibration": found, "head": "calibrated"}

    def _with_embeddings(self, model: PackableCheckpoint, folder: Path) -> Path:
        """Write a checkpoint whose embedding and head are on their grid already.

        Args:
            model: its head is on the grid. An embedding of its own is rounded to the nearest value.
            folder: for the checkpoint; one that exists is kept.
        """
        if folder.exists():
            return folder
        recipe, reader = self.recipe, model.reader
        with whole_folder(folder) as unfinished:
            copy = PatchedCopy(reader, unfinished)
            copy.create(self.run.progress)
            blocks = dict[str, StoredBlocks]()
            for name, values in self.ends.items():
                weight = reader.read(name)
                if values in GRID_BITS:
                    grid = GroupGrid(GRID_BITS[values], recipe.group_size or DEFAULT_GROUP)
                    copy.write(name, grid.dequantize(*grid.quantize(weight)))
                elif (own := fitting(values, weight.shape[1])) in BLOCKS:
                    blocks[name] = reader.blocks(name) or StoredBlocks(
                        own, BlockGrid(own).quantize(weight).encode()
                    )
                    copy.write(name, blocks[name].stored)
            copy.sync()
            if blocks:
                BlockFiles(unfinished).write("ends", blocks)
        return folder

    def _pack(
        self, model: PackableCheckpoint, plan: StoragePlan, *, is_rounded: bool
    ) -> PackedCheckpoint:
        """Write the compressed checkpoint into the folder of the run, and verify it."""
        run, recipe, reader = self.run, self.recipe, model.reader
        made, source, progress = run.folder.fresh_model(), run.source, run.progress
        files = plan.files(reader)
        check_free(sum(spec.nbytes for file in files for spec in file.tensors.values()), made)
        progress.start("packing", len(reader.entries))
        tensors = plan.packed_tensors(model, progress)
        write_packed(made, files, tensors, archive=recipe.archive)
        progress.finish()
        # only now: the plan has counted what packing lost
        kept = not is_rounded and plan.keeps_weights(reader)
        layouts = [layout for file in files for layout in file.layouts.values()]
        config = read_configuration(source.folder)
        config.pop("torch_dtype", None)  # the older name of `dtype`, which transformers reads too
        config["dtype"] = str(plan.computed).removeprefix("torch.")
        config["quantization_config"] = quantization_config(recipe.archive, layouts)
        run.carry_over(config, same_weights=kept)
        packed = PackedCheckpoint(made)
        progress.start("verifying", len(packed.specs))
        for name, _ in packed.tensors():
            progress.step(note=name)
        progress.finish()
        return packed

    def _gguf(self, model: PackableCheckpoint, plan: StoragePlan) -> Path:
        """Write the model as a GGUF file into the folder of the run, and read it back."""
        from secateur.exporting import ExportSource
        from secateur.exporting.gguf.writing import ENDS, NEAREST, GGUFFile

        recipe, made = self.recipe, self.run.folder.fresh_model()
        name = Path(recipe.model.partition("@")[0]).name.removesuffix(".gguf")
        own = {name: NEAREST[choice.layout.values] for name, choice in plan.choices.items()}
        kinds = [kind for name, kind in own.items() if model.matrices[name].prunable]
        whole = GGUFFile(ExportSource(model.reader, name), max(kinds, key=kinds.count), own)
        file = made / f"{name}-{recipe.values}.gguf"
        whole.write(file, self.run.progress)
        for one, weight, read in whole.read_back(file, self.run.progress):
            if len(one.shape) > 1 and one.name not in ENDS:
                plan.count_loss(weight.flatten(0, -2), read.flatten(0, -2))
        return file

    def _report(
        self,
        model: PackableCheckpoint,
        plan: StoragePlan,
        made: PackedCheckpoint | Path,
        rounding: dict[str, Any],
    ) -> CompressResult:
        """Add up the contents of a packed folder or a GGUF file; write the record and the card."""
        run, reader, matrices = self.run, model.reader, model.matrices
        folder, source = run.folder, run.source
        linears, embeddings, of_ends = FormatTotals(), FormatTotals(), list[str]()
        dense = dict.fromkeys(("as here", "int8", "int4"), 0)
        by_format: dict[str, FormatTotals] = {}
        negative_zeros = 0
        for name, choice in plan.choices.items():
            size = _bytes_in(made, name, choice)
            counted = (choice.layout.weights, choice.nonzeros, size)
            if not matrices[name].prunable:
                embeddings = embeddings.plus(*counted)
                of_ends.append(stored_as(choice.layout.to_json()).removeprefix(f"{DENSE} "))
                continue
            linears = linears.plus(*counted)
            for values in dense:
                dense[values] += _dense_bytes(choice.layout, values)
            kind = stored_as(choice.layout.to_json())
            by_format[kind] = by_format.get(kind, FormatTotals()).plus(*counted)
            if plan.layout(name) is not None:
                negative_zeros += choice.negative_zeros
        files, dense_too = ([made], False) if isinstance(made, Path) else (made.files, True)
        size = sum(file.stat().st_size for file in files)
        parameters = sum(e.size_bytes // e.dtype.itemsize for e in reader.entries.values())
        dense_bytes = {values: size - linears.bytes + count for values, count in dense.items()}
        report = CompressResult(
            output=run.place,
            archive=self.recipe.archive,
            source_bytes=sum(file.stat().st_size for file in self.model.reader.files),
            bfloat16_bytes=BFLOAT16_BYTES * parameters,
            file_bytes=size,
            ratio=size / (BFLOAT16_BYTES * parameters),
            sparsity=1 - linears.nonzeros / linears.weights,
            negative_zeros=negative_zeros,
            linears=linears,
            formats=by_format,
            embeddings=embeddings,
            embedding_values=" and ".join(dict.fromkeys(of_ends)),
            rounding=rounding,
            value_error=plan.value_error,
            dense_file_bytes=dense_bytes if dense_too and not self.recipe.archive else {},
            seconds=time.perf_counter() - run.meter.started,
            source=source.record.name,
        )
        write_json(folder.notes / COMPRESSION, {**report.to_json(), "source": source.record.name})
        place = self.recipe.output or folder.output
        card = compression_card(report, source.record, source.folder, place)
        write_text(folder.model / "README.md", card)
        return report

    @classmethod
    def result(cls, output: Path) -> CompressResult:
        """Read the result of a finished run from its notes."""
        return read_record(CompressResult, output / NOTES / COMPRESSION)


def _bytes_in(made: PackedCheckpoint | Path, name: str, choice: LayoutChoice) -> int:
    """The bytes of a matrix in a packed folder, or in a GGUF file."""
    if isinstance(made, Path):
        return stored_bytes(choice.layout, choice.nonzeros)
    owner = name.removesuffix(".weight")
    return sum(made.entries[f"{owner}.{part}"].size_bytes for part in made.parts_of(owner))


def _keeps_zeros(values: str) -> bool:
    """Whether zeros stay zeros."""
    return values not in BLOCKS or BlockGrid(values).exact_zero


def _dense_bytes(layout: Layout, values: str) -> int:
    """The size of a matrix that stores its zeros."""
    dense = replace(layout, format=DENSE, pattern=None)
    if values != "as here":
        dense = replace(dense, values=values, group=DEFAULT_GROUP if values == "int4" else None)
    return stored_bytes(dense, layout.weights)


def _rounds_linears(recipe: CompressRecipe) -> bool:
    return bool({*BITS, *BLOCKS} & {recipe.values, *recipe.overrides.values()})
