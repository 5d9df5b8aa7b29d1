"""Formats at rest: how a checkpoint stores its matrices, and what they mean.

A form is one way to store matrices in fewer bits. It shows a folder as dense tensors, each of them
made from its stored parts when it is read. So every verb reads every form with one reader. There is
one file for each tool or dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.checkpoint import CheckpointReader, TensorEntry, damaged, read_entry
from secateur.models.configuration import DESCRIPTIONS, described_by
from secateur.registry import Registry

__all__ = [
    "E2M1",
    "AssembledReader",
    "Assembly",
    "Described",
    "NamedForm",
    "Parts",
    "SourceFolder",
    "StoredForm",
    "damaged",
    "float4",
    "powers_of_two",
    "refuse_empty",
    "spread_blocks",
    "stored_forms",
    "unpacked",
    "view_in",
    "without_description",
]

Parts = Mapping[str, Tensor]
"""Stored tensors, by what each of them is for a matrix."""

Described = Mapping[str, Any]
"""What `config.json` says about the form of the weights."""


@dataclass(frozen=True)
class SourceFolder:
    """A folder whose weights may be stored in some form.

    Attributes:
        folder: has `config.json` and safetensors.
        config: its `config.json`.
        reader: reads its tensors as they are stored.
        dtype: the dtype of the model's weights, as `config.json` names it.
    """

    folder: Path
    config: Mapping[str, Any]
    reader: CheckpointReader
    dtype: torch.dtype


@dataclass(frozen=True)
class Assembly:
    """A dense tensor, and how it is made from stored parts.

    Attributes:
        parts: the name of each stored part, by what it is.
        shape: of the dense tensor.
        dtype: of the dense tensor.
        stored_as: the format, in a word or two.
        make: returns the dense tensor, in `dtype` or in a wider one with the exact values.
        back: takes new values [shape] and the stored parts; returns the parts for these values,
            with the scales that are stored. Zeros stay zeros. None: the form cannot do this.
        stacked: whether the first axis of the dense tensor is the first axis of every part that is
            as long, so that some of its entries can be kept without a change of their bytes. Parts
            of another length serve all entries.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_as: str
    make: Callable[[Parts], Tensor]
    back: Callable[[Tensor, Parts], dict[str, Tensor]] | None = None
    stacked: bool = False


class AssembledReader(CheckpointReader):
    """Reads the dense tensors of a source, each made from its parts when it is read.

    Args:
        stored: the tensors as they are stored.
        made: the dense tensors that have parts, by name.
        config: the configuration of the dense model.
        dropped: stored tensors that are no part of the model, such as scales of activations.
        notes: what a user must know, one sentence each.

    Attributes:
        entries: the dense tensors; the offsets of made ones mean nothing.
        rounded: made tensors that were read, and whether their dtype cannot hold the exact values.
        splits: the tensors that are shown as several ones, with views of each.
    """

    def __init__(
        self,
        stored: CheckpointReader,
        made: Mapping[str, Assembly],
        config: Mapping[str, Any],
        *,
        dropped: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.stored, self.made, self.config = stored, made, dict(config)
        self.dropped, self.notes = dropped, notes
        self.folder, self.files = stored.folder, stored.files
        self.rounded: dict[str, bool] = {}
        self.splits: dict[str, Mapping[str, Tensor]] = {}
        self.owner: dict[str, str] = {}
        self.recent: dict[tuple[str, int | None], Tensor] = {}
        used = {part for assembly in made.values() for part in assembly.parts.values()}
        gone = used | set(dropped)
        self.entries = {n: entry for n, entry in stored.entries.items() if n not in gone}
        for name, assembly in made.items():
            if name in self.entries:
                raise damaged(f"{name} is stored, and so are parts of it", self.folder)
            first = stored.entries[next(iter(assembly.parts.values()))]
            self.entries[name] = TensorEntry.made(first.file, assembly.dtype, assembly.shape)

    def read(self, name: str) -> Tensor:
        """One dense tensor, in memory of its own."""
        if name in self.owner:
            return self.part_of(self.owner[name], name)
        return self.whole(name) if name in self.made else read_entry(self.entries[name])

    def whole(self, name: str) -> Tensor:
        """A made tensor, also if it is shown as several."""
        assembly = self.made[name]
        if not assembly.stacked:
            return self.made_at(name, None)
        # the parts of one entry are spread out at a time: that takes several times their memory
        value = torch.empty(assembly.shape, dtype=assembly.dtype)
        for place, entry in enumerate(value):
            entry.copy_(self.made_at(name, place)[0])
        return value

    def made_at(self, name: str, place: int | None) -> Tensor:
        """A made tensor; or of a stacked one [1, …], the entry at a place of its first axis."""
        assembly = self.made[name]
        shape = assembly.shape if place is None else (1, *assembly.shape[1:])
        parts = {role: self._part(part, assembly, place) for role, part in assembly.parts.items()}
        try:
            exact = assembly.make(parts)
        except CheckpointError as error:
            raise CheckpointError(error.what, where=name, remedy=error.remedy) from None
        if tuple(exact.shape) != shape:
            raise damaged(f"the parts make {list(exact.shape)}, not {list(shape)}", name)
        value = exact.to(assembly.dtype)
        if not value.isfinite().all():
            raise damaged(f"the parts make numbers that are not finite in {assembly.dtype}", name)
        self.rounded[name] = self.rounded.get(name, False) or not torch.equal(
            value.to(exact.dtype), exact
        )
        return value.contiguous()

    def _part(self, part: str, assembly: Assembly, place: int | None) -> Tensor:
        """A stored part, or what an entry of a stacked tensor needs of it."""
        entry = self.stored.entries[part]
        if place is None or entry.shape[:1] != assembly.shape[:1]:
            return self.stored.read(part)
        size = entry.size_bytes // entry.shape[0]
        offset, shape = entry.offset + place * size, (1, *entry.shape[1:])
        return read_entry(replace(entry, offset=offset, size_bytes=size, shape=shape))

    def split(self, name: str, views: Mapping[str, Tensor]) -> None:
        """From now on, show a tensor as several; see `CheckpointReader.split`."""
        super().split(name, views)
        self.splits[name] = views
        if name in self.made:
            self.owner |= dict.fromkeys(views, name)

    def unsplit(self) -> AssembledReader:
        """A reader of the same source that shows no tensor as several."""
        return AssembledReader(
            self.stored, self.made, self.config, dropped=self.dropped, notes=self.notes
        )

    def part_of(self, owner: str, name: str) -> Tensor:
        """One of the tensors that a made tensor is shown as.

        The two made tensors that were read last are kept, since gate and up lie in one. Of stacked
        experts they are those of one expert.
        """
        assembly, entry, place = self.made[owner], self.entries[name], None
        if assembly.stacked:
            size = prod(assembly.shape[1:]) * assembly.dtype.itemsize
            place = entry.offset // size
            entry = replace(entry, offset=entry.offset % size)
        if (owner, place) not in self.recent:
            for old in list(self.recent)[:-1]:
                del self.recent[old]
            self.recent[owner, place] = self.made_at(owner, place)
        own = view_in(self.recent[owner, place], entry)
        return own.clone(memory_format=torch.contiguous_format)

    def mapped(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors one after the other; made ones are read, since they cannot be mapped."""
        plain = [name for name in names if name in self.stored.entries]
        yield from self.stored.mapped(plain)
        for name in names:
            if name not in self.stored.entries:
                yield name, self.read(name)


def view_in(whole: Tensor, entry: TensorEntry) -> Tensor:
    """A part of a contiguous tensor, as a view; the entry's offset counts from its first byte."""
    start = entry.offset // entry.dtype.itemsize  # in values, as torch counts
    if entry.strides is not None:
        return whole.view(-1).as_strided(entry.shape, entry.strides, start)
    return whole.view(-1)[start : start + prod(entry.shape)].view(entry.shape)


class StoredForm(Protocol):
    """The contract of a form."""

    name: ClassVar[str]

    def recognises(self, source: SourceFolder) -> bool:
        """Whether this is the form of the source; reads names, dtypes and the configuration.

        It is called for sources whose configuration has one of `DESCRIPTIONS`.
        """
        ...

    def open(self, source: SourceFolder) -> AssembledReader:
        """Return a reader of the dense tensors.

        Raises:
            CheckpointError: parts are missing, or contradict each other.
            ArchitectureError: the source needs what a plain model cannot express.
        """
        ...


class NamedForm(ABC):
    """A form that `quant_method` of the configuration names; a subclass makes its matrices.

    Attributes:
        aliases: what `quant_method` may call it besides its name.
        keys: those of `DESCRIPTIONS` that only this form has.
        of_activations: the last part of the names of tensors that are no part of the dense model.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[tuple[str, ...]] = ()
    of_activations: ClassVar[tuple[str, ...]] = ()

    def recognises(self, source: SourceFolder) -> bool:
        """Whether the configuration names this form."""
        named = described_by(source.config).get("quant_method")
        return named in (self.name, *self.aliases) or any(key in source.config for key in self.keys)

    def open(self, source: SourceFolder) -> AssembledReader:
        """Return a reader that makes each matrix when it is read."""
        described = described_by(source.config)
        return AssembledReader(
            source.reader,
            self.assemblies(source, described),
            without_description(source.config),
            dropped=tuple(
                n for n in source.reader.entries if n.rpartition(".")[2] in self.of_activations
            ),
            notes=self.notes(described),
        )

    @abstractmethod
    def assemblies(self, source: SourceFolder, described: Described) -> dict[str, Assembly]:
        """The dense tensors that have parts, by name.

        Raises:
            CheckpointError: parts are missing, or contradict each other.
            ArchitectureError: the source needs what a plain model cannot express.
        """

    def notes(self, described: Described) -> tuple[str, ...]:
        """What a user must know, one sentence each."""
        return ()


def refuse_empty(made: Mapping[str, Assembly], form: str, source: SourceFolder) -> None:
    """Refuse a folder whose configuration names a form in which no matrix is stored."""
    if not made:
        raise damaged(f"config.json says {form}, and no matrix is stored so", source.folder)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers of words along a new last axis, the lowest bits first.

    Example:
        >>> import torch
        >>> from secateur.models.at_rest import unpacked
        >>> unpacked(torch.tensor([0x21], dtype=torch.int32), 4)[0, :3].tolist()
        [1, 2, 0]
    """
    each = 8 * words.itemsize // bits  # bits that are left over at the top hold nothing
    shifts = torch.arange(each, dtype=words.dtype) * bits
    return (words.unsqueeze(-1) >> shifts) & (2**bits - 1)


def spread_blocks(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Scales [..., blocks of rows, of columns] as they multiply a matrix; one scale stays one.

    The last block of an axis may be shorter than the others.

    Example:
        >>> import torch
        >>> from secateur.models.at_rest import spread_blocks
        >>> spread_blocks(torch.tensor([[1.0, 2.0]]), (2, 3), (2, 2)).tolist()
        [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]
    """
    if scale.numel() == 1:
        return scale.reshape((1,) * len(shape))
    for axis, size in ((-2, block[0]), (-1, block[1])):
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of 4-bit floating point by code: a sign, two bits of exponent, one of mantissa."""


def float4(pairs: Tensor) -> Tensor:
    """The numbers [..., 2n] of bytes [..., n] that hold two codes each, float32.

    The first number is in the low four bits.

    Example:
        >>> import torch
        >>> from secateur.models.at_rest import float4
        >>> float4(torch.tensor([[0x9F, 0x21]], dtype=torch.uint8)).tolist()
        [[-6.0, -0.5, 0.5, 1.0]]
    """
    codes = unpacked(torch.arange(256, dtype=torch.uint8), 4)  # of every byte
    both = torch.tensor(E2M1)[codes.to(torch.int32)]
    return both[pairs.view(torch.uint8).to(torch.int32)].flatten(-2)


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(e − 127) of exponents in bytes, float64."""
    ones = torch.ones(exponents.shape, dtype=torch.float64)
    return torch.ldexp(ones, exponents.to(torch.int32) - 127)


def without_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the dense model."""
    kept = {key: value for key, value in config.items() if key not in DESCRIPTIONS}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = {k: v for k, v in text.items() if k not in DESCRIPTIONS}
    return kept


stored_forms: Registry[StoredForm] = Registry("form at rest", __name__, "stored_forms")
