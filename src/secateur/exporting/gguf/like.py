"""Where the matrices of a model are in a GGUF file, found by comparing numbers.

Nothing of the model's family has to be known. The names of gguf's own tables say which tensor to
compare with which; without a name, all matrices of the same layer are compared. A tensor of the
file may have the rows of a matrix in another order (heads whose channels are interleaved), a part
of its rows (a fused projection that the file splits), or those of several (one that it fuses). A
row of the file is looked for among the rows of the model by its cosine, and then it must be a
rounding of the row that was found:

    ‖ŵ − w‖ ≤ ‖step‖   and   ‖ŵ − w‖ ≤ ‖w‖       for each row, and for each 32 columns
    step = (max ŵ − min ŵ) / (levels − 1)       of 32 weights;  levels = 2^bits of the file's type

Rounding to the nearest errs by 0.3 steps, and by up to 0.8 where the errors of columns compensate
each other. Of rows that have nothing in common, ‖ŵ − w‖ is √2 ‖w‖. Another order must be that of
nested loops over the axes of a matrix, or of a few such pieces, as converters make it.

A tensor that no matrix of the model gives is refused by name. Numbers in float32 that are no
matrices of the model (norms, biases, factors) must be the same, perhaps plus 1 as norms of Gemma
are, or −exp as of a state space; those that gguf's tables do not name stay unchecked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.exporting import ExportSource
from secateur.exporting.gguf.architectures import model_of
from secateur.exporting.gguf.edit import Edit, Kept
from secateur.exporting.gguf.llama_cpp import decoded
from secateur.models.checkpoint import CheckpointReader
from secateur.models.gguf_file import GGUFSource, StoredTensor
from secateur.progress import Progress, each_step
from secateur.quantization.blocks import TYPES
from secateur.runtime.storage_plan import MixedReader, PackableCheckpoint

Q = gguf.GGMLQuantizationType
FLOATS = {Q.F32: 2.0**-20, Q.F16: 2.0**-10, Q.BF16: 2.0**-7}
"""How far a number of the file may be from that of the model, as a fraction: the file may have been
made from a wider type, or the model from a narrower one."""

SMALLEST = 2.0**-24
"""Numbers of float16 are multiples of this, so it is always allowed."""

SPAN, COMPARED, AT_ONCE = 32, 512, 2**24
"""Weights whose range gives a step, columns that find a row, and cosines in memory at once."""

PIECES, CUTS = 3, 64
"""Orders of rows in one matrix, such as those of queries, keys and values, and places between them.
"""

CHANGES: Sequence[Callable[[Tensor], Tensor]] = (
    lambda x: x,
    lambda x: x + 1,
    lambda x: -x.exp(),
)
"""What converters do to vectors."""

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Sheet:
    """A matrix of the file: a tensor, or one expert of a stack.

    Attributes:
        sources: matrices of the model whose rows it has, by stored name.
        rows: for each of its rows the number of the row of these, one below the other, int64
            [out]; None for the same order.
        columns: the same of its columns, int64 [in].
        transposed: whether all this is true of the transpose, as of the keys of MLA.
    """

    sources: tuple[str, ...]
    rows: Tensor | None = None
    columns: Tensor | None = None
    transposed: bool = False

    @property
    def by_rows(self) -> bool:
        """Whether its rows are rows of the model, so that blocks of these are blocks of it."""
        return self.columns is None and not self.transposed


@dataclass(frozen=True)
class FileLayout:
    """The matrices of a model in a GGUF file.

    Attributes:
        file: the file, or another one with the same tensors.
        model: the model.
        sheets: the matrices of each tensor of the file that has some, by its name.
        unchecked: tensors that gguf's tables do not name, and that are no matrices of the model.
    """

    file: GGUFSource
    model: PackableCheckpoint
    sheets: Mapping[str, tuple[Sheet, ...]]
    unchecked: tuple[str, ...] = ()

    @classmethod
    def written(cls, file: GGUFSource, model: PackableCheckpoint) -> FileLayout:
        """The matrices of a model in a GGUF file that was exported from it here."""
        source = ExportSource(model.reader)
        described = model_of(source)

        def sheet(name: str) -> Sheet:
            order = torch.arange(model.shape_of(name)[0])
            rows = described.arranged(name, order[:, None]).flatten()
            return Sheet((name,), None if torch.equal(rows, order) else rows)

        planned = (one for one in described.tensors(source) if len(one.shape) > 1)
        return cls(file, model, {one.name: tuple(map(sheet, one.sources)) for one in planned})

    @cached_property
    def places(self) -> dict[str, list[tuple[str, int, Tensor, Tensor, Sheet]]]:
        """Where a matrix of the model is: tensor, sheet, rows there, rows here, and the sheet."""
        found = defaultdict[str, list[tuple[str, int, Tensor, Tensor, Sheet]]](list)
        for tensor, sheets in self.sheets.items():
            for number, sheet in enumerate(sheets):
                first = 0
                for name in sheet.sources:
                    count = self.model.shape_of(name)[0]
                    rows = torch.arange(count) if sheet.rows is None else sheet.rows - first
                    there = ((rows >= 0) & (rows < count)).nonzero().flatten()
                    if len(there):
                        found[name].append((tensor, number, there, rows[there], sheet))
                    first += count
        return dict(found)

    @cached_property
    def values(self) -> dict[str, str]:
        """The type of every matrix of the model that gets other codes, by stored name.

        The others stay as the file has them: their type is none of ours, they lie in tensors of
        different types, or the file has no rows of theirs: columns have another order.
        """
        found = dict[str, str]()
        for name in self.model.matrices:
            places = self.places.get(name, ())
            kinds = {self.file.tensors[tensor].type.name.lower() for tensor, *_ in places}
            if len(kinds) == 1 and all(sheet.by_rows for *_, sheet in places):
                found[name] = kinds.pop()
        return {name: kind for name, kind in found.items() if kind in TYPES}

    @cached_property
    def replaced(self) -> tuple[str, ...]:
        """The tensors of the file that get other codes."""
        return tuple(
            tensor
            for tensor, sheets in self.sheets.items()
            if all(name in self.values for sheet in sheets for name in sheet.sources)
        )

    def encoded(self, tensor: str, blocks_of: Callable[[str], Tensor]) -> np.ndarray:
        """The bytes of a tensor of the file with other codes.

        Args:
            tensor: one of `replaced`.
            blocks_of: the bytes of a matrix of the model, by stored name, uint8 [out, row_bytes].
        """
        found = []
        for sheet in self.sheets[tensor]:
            rows = torch.cat([blocks_of(name) for name in sheet.sources])
            found.append(rows if sheet.rows is None else rows[sheet.rows])
        return torch.stack(found).numpy()

    def edit(self, blocks_of: Callable[[str], Tensor]) -> Edit:
        """The file with other codes in the same types.

        Args:
            blocks_of: as in `encoded`.
        """
        same = Edit.of(self.file)
        made = {
            name: Kept(name, replaced=partial(self.encoded, name, blocks_of))
            for name in self.replaced
        }
        return replace(same, tensors={**same.tensors, **made})

    def weights(self, file: GGUFSource | None = None) -> MixedReader:
        """The model with the matrices of the file, or of another one with the same tensors."""
        decoded: Any = _Decoded(self, file or self.file)
        return MixedReader.of(self.model.reader, dict.fromkeys(self.places, decoded))


class _Decoded:
    """Reads matrices of a model from a GGUF file, in float32."""

    def __init__(self, layout: FileLayout, file: GGUFSource) -> None:
        self.layout, self.file = layout, file

    def read(self, name: str) -> Tensor:
        """A matrix, as the model stores it."""
        found = self.layout.model.weight(name)
        for tensor, number, there, here, sheet in self.layout.places[name]:
            rows = sheet_of(self.file.tensors[tensor], number)
            rows = (rows.t() if sheet.transposed else rows)[there]
            if sheet.columns is not None:
                rows = torch.empty_like(rows).index_copy_(1, sheet.columns, rows)
            found[here] = rows
        matrix = self.layout.model.matrices.get(name)
        return found.t().contiguous() if matrix and matrix.transposed else found

    def mapped(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Several matrices."""
        yield from ((name, self.read(name)) for name in names)


def sheet_of(tensor: StoredTensor, number: int = 0) -> Tensor:
    """A matrix of the file, float32 [out, in].

    Args:
        tensor: of the file.
        number: of the expert, in a stack.
    """
    stacked = len(tensor.shape) > 2
    stored = tensor.read([number]) if stacked else tensor.read()
    rows = stored.reshape(tensor.shape[-2], -1)
    return decoded(rows, tensor.type)


def layout_of(file: GGUFSource, model: PackableCheckpoint, progress: Progress) -> FileLayout:
    """Find the matrices of a model in a GGUF file.

    Args:
        file: made from the model, by whatever converter and quantizer.
        model: the model.
        progress: receives every tensor of the file.

    Raises:
        RecipeError: names the tensor of the file that is none of the model's, or the matrix of the
            model that the file has not.
    """
    named, sheets, unchecked = (
        _named(file, model.reader),
        dict[str, tuple[Sheet, ...]](),
        list[str](),
    )
    for name in each_step(progress, f"comparing with {file.file.name}", file.tensors):
        tensor, own = file.tensors[name], named.get(name, [])
        found = _sheets(tensor, own, model) if 2 <= len(tensor.shape) <= 3 else None
        if found is not None:
            sheets[name] = found
        elif tensor.type != Q.F32 or (own and not _same_numbers(tensor, own, model.reader)):
            meant = f"no rounding of {own[0]!r}" if own else "no matrix of its layer in the model"
            raise _refused(file, name, f"the tensor is {meant}")
        elif not own:
            unchecked.append(name)
    layout = FileLayout(file, model, sheets, tuple(unchecked))
    for name in model.matrices:
        rows = [row for *_, here, _ in layout.places.get(name, ()) for row in here.tolist()]
        if sorted(rows) != list(range(model.shape_of(name)[0])):
            fault = "twice, or only a part of it" if rows else "not"
            raise _refused(file, name, f"the file has this matrix of the model {fault}")
    return layout


def _refused(file: GGUFSource, name: str, fault: str) -> RecipeError:
    return RecipeError(
        fault,
        where=f"{name}, {file.file}",
        remedy="name the model that the file was made from, and a whole copy of the file",
    )


def _named(file: GGUFSource, reader: CheckpointReader) -> dict[str, list[str]]:
    """The tensors of the model that gguf's tables name for one of the file; experts in order."""
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}.get(file.architecture)
    found = defaultdict[str, list[str]](list)
    if known is None:
        return found
    names = gguf.get_tensor_name_map(known, int(file.get("block_count", 0)))
    for name in sorted(reader.entries, key=_expert):
        stack = EXPERT.sub(".experts.", name)
        for variant in dict.fromkeys((stack, stack.replace("language_model.", ""))):
            theirs = names.get_name(variant, try_suffixes=(".weight", ".bias"))
            if theirs is not None:
                found[theirs].append(name)
                break
    return found


def _expert(name: str) -> int:
    """The number of the expert that a tensor of the model belongs to; −1 for none."""
    found = EXPERT.search(name)
    return int(found[1]) if found else -1


def _sheets(
    tensor: StoredTensor, own: Sequence[str], model: PackableCheckpoint
) -> tuple[Sheet, ...] | None:
    """The matrices of a tensor of the file; None if the model has none that give it."""
    layer = re.match(r"blk\.(\d+)\.", tensor.name)
    number, entries = int(layer[1]) if layer else -1, model.reader.entries
    # layers that predict further tokens follow the last one in the file
    near = [n for n in entries if _layer(n) == number] or [n for n in entries if "mtp" in n]
    for names in filter(None, (own, near)):
        for transposed in (False, True):
            found = list[Sheet]()
            for number, pool in enumerate(_pools(tensor, names, model, transposed=transposed)):
                sheet = _sheet(sheet_of(tensor, number), tensor.type, pool, model, transposed)
                if sheet is None:
                    break
                found.append(sheet)
            else:
                if found:
                    return tuple(found)
    return None


def _pools(
    tensor: StoredTensor, names: Sequence[str], model: PackableCheckpoint, *, transposed: bool
) -> list[tuple[str, ...]]:
    """For each matrix of a tensor, those of the model whose rows it may have; empty for none."""
    *stack, rows, columns = tensor.shape
    fitting = [
        name for name in names if model.shape_of(name)[1:] == (rows if transposed else columns,)
    ]
    experts = [tuple(n for n in fitting if _expert(n) == e) for e in range(sum(stack))]
    plain = tuple(n for n in fitting if _expert(n) < 0)
    if stack and all(experts):
        return experts
    return [plain] * (sum(stack) or 1) if plain else []


def _layer(name: str) -> int:
    """The number of the layer of a tensor of the model; −1 outside of all."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _sheet(
    found: Tensor, kind: Q, names: tuple[str, ...], model: PackableCheckpoint, transposed: bool
) -> Sheet | None:
    """Where the rows of a matrix of the file are among those of matrices of the model."""
    matrices = {name: model.weight(name) for name in names}
    alike = {n: x for n, x in matrices.items() if x.shape == found.shape and not transposed}
    for name, matrix in alike.items():
        if _rounds(found, matrix, kind):
            return Sheet((name,))
    pool, turned = torch.cat([*matrices.values()]), found.t() if transposed else found
    sizes, rows = [len(matrix) for matrix in matrices.values()], _nearest(turned, pool)
    own = pool[rows].t() if transposed else pool[rows]
    if _in_order(rows, sizes) and _rounds(found, own, kind):
        # without the matrices that give none of these rows
        ends = torch.tensor(sizes).cumsum(0)
        used, owners = torch.bucketize(rows, ends, right=True).unique(return_inverse=True)
        moved = torch.tensor(sizes)[used].cumsum(0) - ends[used]
        own_names = tuple(names[number] for number in used.tolist())
        return Sheet(own_names, rows + moved[owners], transposed=transposed)
    for name, matrix in alike.items():
        columns = _nearest(found.t(), matrix.t())
        if _in_order(columns, [len(columns)]) and _rounds(found, matrix[:, columns], kind):
            return Sheet((name,), columns=columns)
    return None


def _in_order(rows: Tensor, sizes: Sequence[int]) -> bool:
    """Whether a converter may take rows in this order: by a few loops over axes of a matrix.

    Args:
        rows: numbers of rows of several matrices, one below the other.
        sizes: the rows of each.
    """
    owners = torch.bucketize(rows, torch.tensor(sizes).cumsum(0), right=True)
    lengths = owners.unique_consecutive(return_counts=True)[1].tolist()
    parts = [rows] if len(lengths) > len(sizes) else rows.split(lengths)
    forward = len(parts) == len(lengths)  # from one matrix to another, steps may go back
    return len(rows.unique()) == len(rows) and all(_pieces(part, forward) for part in parts)


def _pieces(rows: Tensor, forward: bool, most: int = PIECES) -> bool:
    """Whether numbers are those of loops, or of several, one after the other, cut at few places."""
    if _loops(rows, forward) or most == 1:
        return _loops(rows, forward)
    count = len(rows)
    step = next((n for n in range(max(8, count // CUTS), count) if count % n == 0), count)
    return any(
        _loops(rows[:end], forward) and _pieces(rows[end:], forward, most - 1)
        for end in range(count - step, 0, -step)
    )


def _loops(rows: Tensor, forward: bool) -> bool:
    """Whether numbers are those of nested loops, each with one step; forward, or also back."""
    while len(rows) > 1:
        step = rows[1] - rows[0]
        count = int((rows == rows[0] + step * torch.arange(len(rows))).cumprod(0).sum())
        if len(rows) % count or (forward and step < 0):
            return False
        inner = rows.view(-1, count)
        if not torch.equal(inner - inner[:, :1], (step * torch.arange(count)).expand_as(inner)):
            return False
        rows = inner[:, 0]
    return True


def _nearest(found: Tensor, pool: Tensor) -> Tensor:
    """For each row the number of the one with the largest cosine in a pool, int64 [rows].

    Equal rows of the pool are taken in their order.
    """
    units = [torch.nn.functional.normalize(x[:, :COMPARED]) for x in (found, pool)]
    parts = units[0].split(max(1, AT_ONCE // len(pool)))
    rows = torch.cat([(part @ units[1].t()).argmax(dim=1) for part in parts])
    if len(rows.unique()) == len(rows):
        return rows
    kinds = pool.unique(dim=0, return_inverse=True)[1]  # equal rows are of one kind
    wanted, counts = kinds[rows], kinds.bincount()
    own, place = wanted.bincount(minlength=len(counts)), wanted.argsort(stable=True)
    rank = torch.empty_like(rows)  # among the rows that want the same kind
    rank[place] = torch.arange(len(rows)) - (own.cumsum(0) - own)[wanted[place]]
    first = counts.cumsum(0) - counts
    return kinds.argsort(stable=True)[first[wanted] + rank.minimum(counts[wanted] - 1)]


def _rounds(found: Tensor, weight: Tensor, kind: Q) -> bool:
    """Whether each row of the file is a rounding of that of the model (see the module)."""
    wrong = (found - weight).abs()
    if kind in FLOATS:
        return bool((wrong <= weight.abs() * FLOATS[kind] + SMALLEST).all())
    (bits,) = re.findall(r"^\D+(\d)", kind.name)
    spans = found.unflatten(1, (-1, SPAN))
    steps = (spans.amax(2) - spans.amin(2)) / (max(3, 2 ** int(bits)) - 1)
    # sums of squares of every span [rows, spans]
    error, own = (x.square().unflatten(1, (-1, SPAN)).sum(2) for x in (wrong, weight))
    bounds = SPAN * steps.square(), own
    return all(
        bool((error.sum(axis) <= bound.sum(axis) + error.shape[axis] * SPAN * SMALLEST**2).all())
        for axis in (0, 1)
        for bound in bounds
    )


def _same_numbers(tensor: StoredTensor, own: Sequence[str], reader: CheckpointReader) -> bool:
    """Whether a float32 tensor has the numbers of the model's, in an order of converters."""
    found = torch.from_numpy(tensor.read().reshape(-1).view(np.float32))
    parts = [reader.read(name).float().flatten() for name in own]
    sizes, numbers = [len(part) for part in parts], torch.cat(parts)
    if len(numbers) != len(found):
        return False
    for changed in (change(numbers) for change in CHANGES):
        order = torch.empty_like(found, dtype=torch.int64)
        order[found.argsort(stable=True)] = changed.argsort(stable=True)
        for rows in (torch.arange(len(found)), order):
            if _rounds(found[None], changed[rows][None], Q.BF16) and _in_order(rows, sizes):
                return True
    return False
