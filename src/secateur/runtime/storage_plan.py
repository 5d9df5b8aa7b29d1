"""Plans how every tensor of a checkpoint is stored, and packs them by the plan.

There are two passes over the source, with one matrix in memory. The first pass (`make_plan`) counts
zeros and chooses the smallest layout for each matrix: bitmask, N:M, or dense where packing does not
pay. So all sizes are known. The second pass (`StoragePlan.packed_tensors`) packs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import ArchitectureError, CheckpointError, RecipeError
from secateur.models.architecture import describe, linears_of
from secateur.models.block_files import StoredBlocks
from secateur.models.checkpoint import CheckpointReader, shard_name
from secateur.models.shape import LARGE_ENDS
from secateur.models.skeleton import build_skeleton, refuse_missing, stored_names
from secateur.progress import Progress, each_step
from secateur.recipes.compress import CompressRecipe
from secateur.runtime import formats as packing
from secateur.runtime.formats import BITS, BLOCKS, GRID_BITS, Layout, PartSpec, fitting, formats
from secateur.runtime.formats.kept import kept_mask
from secateur.runtime.packed import PlannedFile
from secateur.types import FLOATS

AUTO = "auto"
DENSE = "dense"
"""The format that holds any matrix, taken where no other is smaller."""
KEEP = "keep"
"""Values in the dtype of the source, so that no number changes."""
DEFAULT_GROUP = 64
"""How many weights of a row share a scale in int4, int3 and int2."""
WITHOUT_LOSS = {dtype: name for name, dtype in FLOATS.items()} | {torch.float64: "float32"}
"""The stored dtypes with `keep`: unchanged, except float64, in which no runtime computes."""


@dataclass(frozen=True)
class LayoutChoice:
    """How one matrix will be stored.

    Attributes:
        layout: its layout.
        nonzeros: weights that are not zero.
        negative_zeros: zeros stored as −0.0.
        offered: whether an allowed format other than `dense` could store the matrix.
    """

    layout: Layout
    nonzeros: int
    negative_zeros: int
    offered: bool = False


AT_ONCE = 2**20
"""Weights whose rounding is measured at the same time."""


@dataclass(frozen=True)
class PackableMatrix:
    """A stored tensor that can be packed.

    Attributes:
        transposed: whether it is stored [in, out].
        linear: name of the linear of a decoder layer; empty for an embedding and the head.
        head: whether it is the head, which a tied embedding is too.
    """

    transposed: bool = False
    linear: str = ""
    head: bool = False

    @property
    def prunable(self) -> bool:
        """Whether it is a linear of a decoder layer."""
        return bool(self.linear)

    def choose_layout(
        self, stored: Tensor, name: str, *, format: str, values: str, group: int | None = None
    ) -> LayoutChoice:
        """The smallest layout among the allowed ones; dense is always allowed.

        Args:
            stored: the tensor, as in the source.
            name: of the tensor.
            format: `auto`, or a name in `formats`: that format or dense.
            values: a name in `VALUES` or `BLOCKS`, or `keep`.
            group: the weights of a row that share a scale, for int4, int3 and int2.

        Raises:
            CheckpointError: a plain checkpoint does not have its dtype.
        """
        if stored.dtype not in WITHOUT_LOSS:
            raise CheckpointError(
                f"weights of {stored.dtype} cannot be packed",
                where=name,
                remedy="name the checkpoint in float32, bfloat16 or float16, before quantization",
            )
        weight = stored.t() if self.transposed else stored  # [out, in]
        dense = Layout(
            DENSE,
            WITHOUT_LOSS[stored.dtype] if values == KEEP else fitting(values, weight.shape[1]),
            (weight.shape[0], weight.shape[1]),
            transposed=self.transposed,
            group=(group or DEFAULT_GROUP) if values in GRID_BITS else None,
        )
        # the values as they are stored: a cast to float16 makes zeros of the smallest
        cast = (weight if dense.coded else weight.to(dense.dtype)).contiguous()
        nonzero = cast != 0
        nonzeros = int(torch.count_nonzero(nonzero))
        negative_zeros = int(torch.count_nonzero(kept_mask(cast))) - nonzeros
        offered = [
            layout
            for name in formats
            if dense.blocks is None
            and name != DENSE
            and (name == format or (format == AUTO and formats[name].automatic))
            for layout in formats[name].candidates(nonzero, dense)
        ]
        # of equal sizes the first, which is dense: fewest steps to a weight
        best = min([dense, *offered], key=lambda layout: packing.stored_bytes(layout, nonzeros))
        return LayoutChoice(best, nonzeros, negative_zeros, bool(offered))


@dataclass(frozen=True)
class PackableCheckpoint:
    """A checkpoint, and its matrices that can be packed.

    Attributes:
        reader: reads every tensor.
        matrices: by stored name.
    """

    reader: CheckpointReader
    matrices: Mapping[str, PackableMatrix]

    @classmethod
    def open(cls, folder: Path) -> PackableCheckpoint:
        """Find the linears of a folder, its embedding and its head.

        Raises:
            ArchitectureError: the checkpoint has no such matrix.
        """
        reader = CheckpointReader(folder)
        model = build_skeleton(folder)
        stored = stored_names(model, reader)
        architecture = describe(model)
        layers = enumerate(architecture.layers(model))
        linears = [x for i, y in layers for x in linears_of(y, architecture.layer_name(i)).values()]
        refuse_missing((f"{linear.name}.weight" for linear in linears), stored, folder)
        found = {}
        for linear in linears:
            name = stored[f"{linear.name}.weight"]
            if name.endswith(".weight"):
                found[name] = PackableMatrix(linear.transposed, linear.name)
        if not found:
            raise ArchitectureError(
                f"the checkpoint stores none of the linears of {type(model).__name__} as a matrix "
                "of its own",
                where=str(folder),
                remedy="experts of families that secateur does not declare cannot be compressed; "
                "see CONTRIBUTING.md, 'Add a model family'",
            )
        outside = [model.get_input_embeddings(), model.get_output_embeddings()]
        for path, module in model.named_modules():
            kept = stored.get(f"{path}.weight")  # a tied head is stored only once
            if any(module is x for x in outside) and kept is not None:
                found[kept] = PackableMatrix(head=module is outside[1])
        ends = [name for name, matrix in found.items() if not matrix.prunable]
        if len(ends) == 1:
            found[ends[0]] = PackableMatrix(head=True)
        return cls(reader, found)

    @property
    def file_bytes(self) -> int:
        """Bytes of its weight files."""
        return sum(file.stat().st_size for file in self.reader.files)

    @cached_property
    def linears(self) -> dict[str, str]:
        """The stored name of every linear, by its own name."""
        return {x.linear: name for name, x in self.matrices.items() if x.prunable}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape [out, in] of every linear, by its name."""
        shapes = {linear: self.shape_of(name) for linear, name in self.linears.items()}
        return {linear: (rows, columns) for linear, (rows, columns) in shapes.items()}

    @property
    def ends(self) -> dict[str, tuple[int, int]]:
        """The shapes [out, in] of embedding and head, by their names; one if they are tied."""
        shapes = {n: self.shape_of(n) for n, matrix in self.matrices.items() if not matrix.prunable}
        return {n.removesuffix(".weight"): (rows, columns) for n, (rows, columns) in shapes.items()}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by its stored name; [out, in] of a matrix."""
        shape, matrix = self.reader.entries[name].shape, self.matrices.get(name)
        return shape[::-1] if matrix and matrix.transposed else shape

    def weight(self, name: str) -> Tensor:
        """A tensor in float32, by its stored name; [out, in] of a matrix."""
        stored, matrix = self.reader.read(name).float(), self.matrices.get(name)
        return stored.t() if matrix and matrix.transposed else stored

    @cached_property
    def zero_fractions(self) -> dict[str, float]:
        """The fraction of zeros of every linear, by its name."""
        weights = ((linear, self.reader.read(name)) for linear, name in self.linears.items())
        return {linear: 1 - int(w.count_nonzero()) / w.numel() for linear, w in weights}

    def settled_values(self, values: str) -> str:
        """Resolve `auto`: bfloat16 if most of the weights are wider, else `keep`.

        Most float32 checkpoints hold models that were trained in bfloat16 or expanded from fewer
        bits. The report gives the error of the rounding.
        """
        if values != AUTO:
            return values
        wider = 0  # weights that are, minus those that are not
        for name in self.linears.values():
            entry = self.reader.entries[name]
            size = entry.dtype.itemsize
            wider += entry.size_bytes // size * (1 if size > torch.bfloat16.itemsize else -1)
        return "bfloat16" if wider > 0 else KEEP

    def settled_embeddings(self, embeddings: str, values: str) -> dict[str, str]:
        """The values of embedding and head, by stored name.

        `auto` is int8 beside linears of integers if both are large. Beside blocks of llama.cpp it
        is what llama.cpp's quantizer takes: q6_k for the head, and the linears' type for an
        embedding of its own. Otherwise they are kept.

        Args:
            embeddings: as in the recipe.
            values: those of the linears.
        """
        ends = {name: matrix for name, matrix in self.matrices.items() if not matrix.prunable}
        if embeddings != AUTO:
            return dict.fromkeys(ends, embeddings)
        if values in BLOCKS:
            head = values if values == "q8_0" else "q6_k"
            return {name: head if matrix.head else values for name, matrix in ends.items()}
        sizes = {name: entry.size_bytes for name, entry in self.reader.entries.items()}
        large = sum(sizes[name] for name in ends) >= LARGE_ENDS * sum(sizes.values())
        return dict.fromkeys(ends, "int8" if values in BITS and large else KEEP)


class MixedReader(CheckpointReader):
    """A checkpoint some of whose tensors are read from other folders.

    Args:
        folder: the checkpoint.
        others: the readers of these tensors, by stored name; dtypes and shapes are the same.
    """

    def __init__(self, folder: Path, others: Mapping[str, CheckpointReader]) -> None:
        super().__init__(folder)
        self.others = others

    @staticmethod
    def of(reader: CheckpointReader, others: Mapping[str, CheckpointReader]) -> MixedReader:
        """A reader, perhaps a mixed one, with some other tensors."""
        known = reader.others if isinstance(reader, MixedReader) else {}
        mixed = MixedReader(reader.folder, {**known, **others})
        mixed.entries = dict(reader.entries)  # with its experts as it shows them
        return mixed

    def read(self, name: str) -> Tensor:
        """One tensor, from the folder that it was chosen from."""
        return self.others[name].read(name) if name in self.others else super().read(name)

    def mapped(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as views of the files that they were chosen from."""
        yield from super().mapped([name for name in names if name not in self.others])
        for name in names:
            if name in self.others:
                yield from self.others[name].mapped([name])

    def blocks(self, name: str) -> StoredBlocks | None:
        """The blocks of a matrix, from the folder that it was chosen from."""
        return self.others[name].blocks(name) if name in self.others else super().blocks(name)


@dataclass
class StoragePlan:
    """How every tensor of the source is stored in the result.

    Attributes:
        choices: layouts of the packable matrices, by stored name.
        computed: the dtype in which the model computes.
        dtypes: dtypes of all tensors that are stored under their own names.
        same_embeddings: whether packing changed no embedding on a grid of groups.
        lost: ‖W − Ŵ‖² over the linears, with Ŵ the stored values; known when all are packed.
        norm: ‖W‖² over the linears.
    """

    choices: dict[str, LayoutChoice]
    computed: torch.dtype
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    same_embeddings: bool = True
    lost: float = 0.0
    norm: float = 0.0

    @property
    def value_error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ over the linears; 0 if nothing was rounded."""
        return (self.lost / self.norm) ** 0.5 if self.norm else 0.0

    def count_loss(self, weight: Tensor, stored: Tensor) -> None:
        """Add a linear: W, as the source holds it, and Ŵ, both [out, in]."""
        rows = max(1, AT_ONCE // weight.shape[1])
        for exact, rounded in zip(weight.split(rows), stored.split(rows), strict=True):
            # in float64, and a few rows at a time: a head in float64 would be gigabytes
            self.lost += float((exact.double() - rounded.double()).square().sum())
            self.norm += float(exact.double().square().sum())

    def layout(self, name: str) -> Layout | None:
        """Return the layout of a tensor; None for a tensor that is copied or only cast."""
        choice = self.choices.get(name)
        if choice is None or (choice.layout.format == DENSE and not choice.layout.coded):
            return None
        return choice.layout

    def files(self, reader: CheckpointReader) -> list[PlannedFile]:
        """Assign tensors to files. All parts of a matrix go to the file of its weight."""
        count = len(reader.files)
        files = {
            file: PlannedFile(shard_name("secateur", number, count))
            for number, file in enumerate(reader.files, start=1)
        }
        for name, entry in reader.entries.items():
            planned, layout = files[entry.file], self.layout(name)
            if layout is None:
                planned.tensors[name] = PartSpec(self.dtypes[name], entry.shape)
                continue
            owner = name.removesuffix(".weight")
            planned.layouts[owner] = layout
            # −0.0 counts as a zero and is not kept
            nonzeros = self.choices[name].nonzeros
            for suffix, spec in formats[layout.format].parts(layout, nonzeros).items():
                planned.tensors[f"{owner}.{suffix}"] = spec
        return list(files.values())

    def packed_tensors(
        self, model: PackableCheckpoint, progress: Progress
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the result, in the order of the files, and count what is lost."""
        reader, matrices = model.reader, model.matrices
        # the order of the files, because each is written from beginning to end
        in_order = [n for file in reader.files for n, x in reader.entries.items() if x.file == file]
        for name in in_order:
            tensor, layout = reader.read(name), self.layout(name)
            counts = name in matrices and matrices[name].prunable
            if layout is None:
                stored = tensor.to(self.dtypes[name])
                yield name, stored
            else:
                tensor = tensor.t() if layout.transposed else tensor
                # a cast can make zeros too
                weight = tensor if layout.coded else tensor.to(layout.dtype)
                if self.choices[name].negative_zeros:
                    # pruning by a mask leaves −0.0, which a format would keep like other values
                    weight = weight.masked_fill(weight == 0, 0.0)
                blocks = reader.blocks(name) if layout.blocks else None
                if blocks is not None and blocks.type == layout.values:
                    parts = {"blocks": blocks.packed}
                else:
                    parts = formats[layout.format].pack(weight, layout)
                owner = name.removesuffix(".weight")
                yield from ((f"{owner}.{suffix}", part) for suffix, part in parts.items())
                stored = formats[layout.format].unpack(parts, layout) if counts else tensor
                if not counts and layout.grid is not None:
                    self.same_embeddings &= layout.grid.holds(tensor)
            if counts:
                self.count_loss(tensor, stored)
            progress.step(note=name)

    def keeps_weights(self, reader: CheckpointReader) -> bool:
        """Whether no value changes: the dtypes are those of the source, or the grids are."""
        stored = {name: x.layout.dtype for name, x in self.choices.items()} | self.dtypes
        same = self.same_embeddings and not self.lost
        on_grid = {name for name, x in self.choices.items() if x.layout.grid and same}
        blocks = {name for name, x in self.choices.items() if x.layout.blocks}
        return not blocks and all(
            name in on_grid or stored[name] == entry.dtype for name, entry in reader.entries.items()
        )


def make_plan(
    model: PackableCheckpoint,
    values_of: Mapping[str, str],
    recipe: CompressRecipe,
    progress: Progress,
    computed: torch.dtype = torch.bfloat16,
) -> StoragePlan:
    """Read every matrix and choose its layout.

    Args:
        model: the tensors.
        values_of: the values of single matrices, by stored name; the others have the recipe's.
        recipe: gives format, values and group size.
        progress: receives every matrix.
        computed: the dtype of the model, and of what is not rounded, beside integers and blocks.

    Raises:
        CheckpointError: a matrix has a dtype that cannot be packed.
        RecipeError: the requested format can hold no matrix.
    """
    reader, matrices, format = model.reader, model.matrices, recipe.format
    values = model.settled_values(recipe.values)
    embeddings = model.settled_embeddings(recipe.embeddings, values)
    choices: dict[str, LayoutChoice] = {}
    for name in each_step(progress, "counting", matrices):
        matrix, stored = matrices[name], reader.read(name)
        own = values_of.get(name, values if matrix.prunable else embeddings[name])
        if own == KEEP != values and not matrix.prunable:
            # an embedding that is not rounded to integers is no wider than the model
            beside = FLOATS.get(values, computed)
            wider = stored.dtype.itemsize > beside.itemsize
            own = str(beside).removeprefix("torch.") if wider else KEEP
        choices[name] = matrix.choose_layout(
            stored,
            name,
            format=format if matrix.prunable else DENSE,
            values=own,
            group=recipe.group_size,
        )
    offered = [choice.offered for name, choice in choices.items() if matrices[name].prunable]
    if format not in (AUTO, DENSE) and not any(offered):
        raise RecipeError(
            f"none of the {len(offered)} matrices can be stored as {format!r}",
            where=str(reader.folder),
            remedy="use --format auto or bitmask; n-of-m needs zeros such as --pattern 2:4 leaves",
        )
    if values == KEEP:  # the dtype of most of the weights, without embeddings
        weights = Counter[torch.dtype]()
        for name, choice in choices.items():
            if matrices[name].prunable and not choice.layout.coded:
                weights[choice.layout.dtype] += choice.layout.weights
        computed = max(weights, key=weights.__getitem__, default=torch.bfloat16)
    plan = StoragePlan(choices, FLOATS.get(values, computed))
    for name, entry in reader.entries.items():
        if name in choices:
            if plan.layout(name) is None:
                plan.dtypes[name] = choices[name].layout.dtype
            continue
        wider = entry.dtype.is_floating_point and entry.dtype.itemsize > plan.computed.itemsize
        plan.dtypes[name] = plan.computed if wider and values != KEEP else entry.dtype
    return plan
