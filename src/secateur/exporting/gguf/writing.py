"""Writes a GGUF file, one tensor in memory at a time.

Matrices that the source has in blocks of llama.cpp are copied. A block that is on an int4 grid
(`quantization.groups`) is stored in Q4_0 without a change: its scale has 5 significant bits, which
float16 holds between 2⁻²⁰ and 65504, and |q| ≤ 7 fits in −8 … 7. Other blocks of Q8_0, Q5_0 and
Q4_0 are rounded as llama.cpp rounds them, by the package gguf.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.errors import VerificationError
from secateur.exporting import Exported, ExportSource
from secateur.exporting.gguf.architectures import model_of
from secateur.exporting.gguf.model import LlamaCppModel, Planned
from secateur.exporting.gguf.tokenizer import LlamaCppVocabulary, read_vocabulary
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Progress, each_step
from secateur.quantization.blocks import BlockGrid, Blocks
from secateur.quantization.groups import AT_ONCE, GroupGrid
from secateur.runs.output import check_free
from secateur.runtime.formats import BLOCKS, GRID_BITS, fitting
from secateur.runtime.install import DenseView

BLOCK = 32
"""Weights of a row in one block of Q8_0, Q5_0 and Q4_0."""

Q = gguf.GGMLQuantizationType

TYPES = MappingProxyType(
    {"q8_0": Q.Q8_0, "f16": Q.F16, "bf16": Q.BF16, "f32": Q.F32, "q5_0": Q.Q5_0, "q4_0": Q.Q4_0}
)
"""The types of matrices. Each keeps exact zeros."""

STORED = "stored"
"""The name of the type that gives every matrix what is nearest to how the source stores it."""

FLOATS = {"float32": Q.F32, "float16": Q.F16, "bfloat16": Q.BF16}
OWN = MappingProxyType({name: Q[name.upper()] for name in BLOCKS})
NEAREST = MappingProxyType({**FLOATS, "int8": Q.Q8_0, **dict.fromkeys(GRID_BITS, Q.Q4_0), **OWN})
"""The type for stored values: exact for floats, for integers on a grid of groups and for blocks."""


def _bytes_of(shape: tuple[int, ...], kind: Q) -> int:
    """The bytes of a tensor in a type."""
    return math.prod(gguf.quants.quant_shape_to_byte_shape(shape, kind))


def values_of(reader: CheckpointReader, name: str) -> str:
    """The values of a tensor, as a folder stores them, compressed or not."""
    layout = reader.layout_of(name) if isinstance(reader, DenseView) else None
    dtype = str(reader.entries[name].dtype).removeprefix("torch.")
    return dtype if layout is None else str(layout["values"])


def stored_blocks(weight: Tensor, type: Q) -> np.ndarray:
    """A matrix [rows, columns], or a stack of them, as a file stores it.

    Returns:
        float32 for F32, float16 for F16, else bytes [rows, bytes_per_row].
    """
    values = weight.float()
    if type == Q.Q4_0:
        rows = values.flatten(0, -2).split(max(1, AT_ONCE // values.shape[-1]))
        return np.concatenate([_q4_0(part) for part in rows]).reshape(*weight.shape[:-1], -1)
    if type in (*FLOATS.values(), Q.Q8_0, Q.Q5_0):
        return gguf.quants.quantize(values.numpy(), type)
    return BlockGrid(type.name.lower()).quantize(values).encode().numpy()


def dequantized(stored: np.ndarray, type: Q) -> Tensor:
    """The weights that llama.cpp reads from what was stored."""
    found = stored if type in (Q.F32, Q.F16) else gguf.quants.dequantize(stored, type)
    return torch.from_numpy(found if found.flags.writeable else found.copy())  # a view of a file


def _q4_0(values: Tensor) -> np.ndarray:
    """A float32 matrix as blocks of Q4_0, exact where a block is on an int4 grid."""
    blocks = values.unflatten(1, (-1, BLOCK))
    # [rows, blocks]; a larger group of the source is several blocks with equal scales
    d, _ = GroupGrid(4, BLOCK).scales_on_grid(values)
    d = d.masked_fill(d == 0, 1.0).half()
    codes = (blocks / d[..., None]).round_().clamp_(-8, 7)  # [rows, blocks, 32]
    exact = (codes * d[..., None] == blocks).all(dim=2, keepdim=True)
    one, none = torch.ones_like(d, dtype=torch.int8), torch.zeros_like(d)
    own = Blocks(BlockGrid("q4_0"), codes.to(torch.int8).flatten(1), d, one, none, none.char())
    stored = own.encode()
    if not exact.all():  # llama.cpp's own rounding makes the other blocks
        rounded = torch.from_numpy(gguf.quants.quantize(values.numpy(), Q.Q4_0))
        places = exact.expand(*d.shape, stored.shape[1] // d.shape[1]).flatten(1)
        stored = stored.where(places, rounded)
    return stored.numpy()


FILE_TYPES = {Q.F32: gguf.LlamaFileType.ALL_F32} | {
    kind: file_type
    for kind in NEAREST.values()
    for file_type in gguf.LlamaFileType
    if file_type.name in (f"MOSTLY_{kind.name}", f"MOSTLY_{kind.name}_S")
}
"""The type that a file names. Of K types it is the mix with the least of larger types."""
LARGEST_BLOCK = 256

ENDS = ("token_embd.weight", "output.weight")
"""Embedding and head. With fewer than 8 bits they become Q8_0, because every token reads them. If
the source stores 2 to 4 bits, Q4_0 is exact."""

EXACT = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")
"""Routers and convolutions; float32, as llama.cpp's own files have them."""


@dataclass(frozen=True)
class GGUFFile:
    """A file to be written. Matrices whose blocks the source has are copied byte for byte.

    Attributes:
        source: the model.
        kind: the type of matrices.
        own: other types of single matrices, by their names in the source.
    """

    source: ExportSource
    kind: Q
    own: Mapping[str, Q] = field(default_factory=dict)

    @cached_property
    def model(self) -> LlamaCppModel:
        """The description of the model."""
        return model_of(self.source)

    @cached_property
    def vocabulary(self) -> LlamaCppVocabulary:
        """Its tokenizer."""
        return read_vocabulary(self.source.folder, self.model.vocabulary)

    def write(self, file: Path, progress: Progress) -> Exported:
        """Write the file."""
        extra = dict(self.model.extra_tensors())
        plan = self.plan()
        check_free(self.weight_bytes(plan), file.parent)
        made = Exported(notes=[*self.notes(plan), *self.vocabulary.notes])
        with closing(self.opened(file, plan)) as writer:
            planned = {one.name: one for one in plan}
            for name in each_step(progress, "writing", planned):
                one = planned[name]
                kept = one.sources or None
                weight = self.model.read(self.source.reader, one) if kept else extra[one.name]
                kind = self.type_of(one)
                blocks = self.blocks(one, kind)
                stored = stored_blocks(weight, kind) if blocks is None else blocks.numpy()
                writer.write_tensor_data(stored)
                made.count_tensor(kind.name)
                if weight.ndim > 1 and kept and one.name not in ENDS:
                    made.count_matrix(weight, dequantized(stored, kind))
        made.file_bytes = file.stat().st_size
        return made

    def blocks(self, one: Planned, kind: Q) -> Tensor | None:
        """The bytes of a tensor, if the source has all its matrices in blocks of this type."""
        size = gguf.GGML_QUANT_SIZES[kind][0]
        if not all(self.model.moves_whole(name, one.shape[-1], size) for name in one.sources):
            return None
        found = [self.source.reader.blocks(name) for name in one.sources if kind in OWN.values()]
        parts = [
            self.model.arranged(name, own.packed)
            for name, own in zip(one.sources, found, strict=False)
            if own is not None and OWN[own.type] == kind
        ]
        if not parts or len(parts) < len(one.sources):
            return None
        return torch.stack(parts) if len(one.shape) == 3 else parts[0]

    def read_back(self, file: Path, progress: Progress) -> Iterator[tuple[Planned, Tensor, Tensor]]:
        """Read a written file again, with the package gguf, and compare copied matrices.

        Yields:
            Every tensor of the source: its numbers there, and those that llama.cpp reads, float32.

        Raises:
            VerificationError: a copied matrix has other numbers than the source.
        """
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        plan = {one.name: one for one in self.plan()}
        for name in each_step(progress, "verifying", plan):
            one, kind = plan[name], self.type_of(plan[name])
            if not one.sources:
                continue
            weight = self.model.read(self.source.reader, one)
            read = dequantized(written[name].data, kind)
            if self.blocks(one, kind) is not None and not torch.equal(read, weight):
                raise VerificationError(
                    "the file has other numbers than the model",
                    where=f"{one.name} in {file}",
                    remedy="run the command again; if it fails again, report it",
                )
            yield one, weight, read

    def plan(self) -> list[Planned]:
        """Every tensor of the file."""
        extra = dict(self.model.extra_tensors())
        made = [Planned(name, (), tuple(x.shape)) for name, x in extra.items()]
        return [*self.model.tensors(self.source), *made]

    def nbytes(self) -> int:
        """Bytes of the file that `write` would write. A header is written for it."""
        plan = self.plan()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "header.gguf"
            self.opened(file, plan).close()
            return _padded_bytes(file.stat().st_size) + self.weight_bytes(plan)

    @staticmethod
    def matrix_bytes(shape: tuple[int, int], values: str) -> int:
        """Bytes of a matrix [out, in] whose values are stored so in a packed folder."""
        return _padded_bytes(_bytes_of(shape, type_of_row(shape[1], NEAREST[values])))

    def weight_bytes(self, plan: list[Planned]) -> int:
        """Bytes of all tensors in the file."""
        return sum(_padded_bytes(_bytes_of(one.shape, self.type_of(one))) for one in plan)

    def opened(self, file: Path, plan: list[Planned]) -> gguf.GGUFWriter:
        """The file with everything but the weights."""
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[self.model.arch])
        # llama.cpp swallows spaces behind special tokens only in models of this name
        strips = self.vocabulary.strips and "phi-3" not in self.source.name.lower()
        writer.add_name(f"phi-3 {self.source.name}" if strips else self.source.name)
        writer.add_file_type(FILE_TYPES[self.kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_fields(writer, {**self.model.fields(), **self.vocabulary.fields})
        for one in plan:
            kind = self.type_of(one)
            size, dtype = _bytes_of(one.shape, kind), np.dtype(np.float32)  # `kind` counts
            writer.add_tensor_info(one.name, one.shape, dtype, size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer

    def wanted(self, one: Planned) -> Q:
        """The type that a matrix would have without conditions; the largest one of a stack."""
        # experts of a stack may be stored in different types, and a stack has one
        kinds = [self.own.get(name, self.kind) for name in one.sources] or [self.kind]
        return max(kinds, key=lambda kind: _bytes_of((LARGEST_BLOCK,), kind))

    def type_of(self, one: Planned) -> Q:
        """The type of a tensor."""
        if len(one.shape) == 1 or one.name.endswith(EXACT):
            return Q.F32
        wanted = self.wanted(one)
        if one.name in ENDS and wanted in (Q.Q4_0, Q.Q5_0):
            on_grid = any(values_of(self.source.reader, x) in GRID_BITS for x in one.sources)
            if self.own.keys().isdisjoint(one.sources):
                wanted = Q.Q4_0 if on_grid else Q.Q8_0
        return type_of_row(one.shape[-1], wanted)

    def notes(self, plan: list[Planned]) -> list[str]:
        """What a user must know about the file."""
        notes = []
        odd = [one.name for one in plan if self.type_of(one) == Q.F16 != self.wanted(one)]
        if odd:
            notes.append(
                f"{len(odd)} matrices have rows that are no multiple of {BLOCK} weights long and "
                f"are float16, for example {odd[0]}"
            )
        if self.model.ignored_window:
            notes.append(
                f"llama.cpp ignores the sliding window of {self.model.ignored_window} tokens, so "
                "the context is limited to it"
            )
        if "text_config" in self.source.config:
            notes.append("the parts that see or hear are not in the file: llama.cpp reads another")
        stretched = self.model.stretched_from
        if stretched:
            notes.append(
                f"the context is limited to {stretched} tokens: for a longer one llama.cpp takes "
                "the long factors of LongRoPE for short texts too"
            )
        return notes


def add_fields(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Add fields, each by what follows `add_` in the writer of gguf, or arrays by their key."""
    for name, value in fields.items():
        if "." in name:
            writer.add_array(f"{writer.arch}.{name}", value)
        else:
            getattr(writer, f"add_{name}")(value)


def type_of_row(columns: int, wanted: Q) -> Q:
    """The type of a matrix with so many columns, as llama.cpp's quantizer falls back."""
    return NEAREST[fitting(wanted.name.lower(), columns)] if wanted in OWN.values() else wanted


def _padded_bytes(count: int) -> int:
    """Bytes with the padding that aligns what follows."""
    return gguf.GGUFWriter.ggml_pad(count, gguf.GGUF_DEFAULT_ALIGNMENT)
