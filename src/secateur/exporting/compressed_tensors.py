"""compressed-tensors: the quantized safetensors folder of vLLM, SGLang and transformers.

A linear NAME of the decoder layers is stored as integers q with scales s; its weight is s · q.
There is no zero point, so a zero is exactly the integer 0.

    type    tensors of NAME                                                      scale for
    w8a8    weight int8 [out, in]; weight_scale float32 [out, 1]                 a row
    w8a16   weight_packed int32 [out, in / 4]; weight_scale; weight_shape        a row
    w4a16   weight_packed int32 [out, in / 8]; weight_scale [out, in / group];   a group of a row
            weight_shape int64 [2]

Packed integers of b bits are q + 2^(b − 1), the first of them in the lowest bits. With w8a8 the
engine also rounds activations: to int8, with a scale for each token. All other tensors are those of
the source. The layout is that of https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import ShapeError
from secateur.exporting import Exported, ExportSource, folder, targets
from secateur.models.checkpoint import Specs, TensorEntry, shard_name, size_of, write_shards
from secateur.models.opening import computed_dtype
from secateur.models.varied import MODEL_TYPE
from secateur.progress import Progress, each_step
from secateur.quantization.groups import GROUPS, GroupGrid
from secateur.quantization.int8 import quantize_rows
from secateur.runtime.install import DenseView

SAMPLE = 64
"""Rows of a matrix, at least, that show whether it is on a grid."""

CPU_MULTIPLE = 32
"""The kernels of vLLM for CPUs need matrices whose sides are multiples of this."""


@dataclass(frozen=True)
class Scheme:
    """How linears are stored.

    Attributes:
        bits: of an integer.
        scale: dtype of the scales.
        group: weights of a row that share a scale; None for all of them.
        activations: the bits to which the engine rounds activations; None if it does not. Then
            several integers share an int32.
    """

    bits: int
    scale: torch.dtype
    group: int | None = None
    activations: int | None = None

    @property
    def packed(self) -> bool:
        """Whether several integers share an int32."""
        return self.activations is None

    def specs(self, name: str, out: int, columns: int) -> Specs:
        """The tensors of a linear [out, in]."""
        groups = 1 if self.group is None else columns // self.group
        scale = {f"{name}.weight_scale": (self.scale, (out, groups))}
        if not self.packed:
            return {f"{name}.weight": (torch.int8, (out, columns)), **scale}
        words = -(-columns * self.bits // 32)
        shape = {f"{name}.weight_shape": (torch.int64, (2,))}
        return {f"{name}.weight_packed": (torch.int32, (out, words)), **scale, **shape}

    def tensors(self, name: str, codes: Tensor, scale: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a linear, of its integers [out, in] and scales [out, groups]."""
        if self.packed:
            yield f"{name}.weight_packed", _pack_int32(codes, self.bits)
            yield f"{name}.weight_shape", torch.tensor(codes.shape)
        else:
            yield f"{name}.weight", codes
        yield f"{name}.weight_scale", scale

    def rounded(self, source: ExportSource, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers, int8 [out, in], and the scales [out, groups] of a linear.

        Integers that the source stores, or that its weights are on, stay what they are. A scale is
        negative only where the lowest integer is used, because not all kernels take one.
        """
        groups = 1 if self.group is None else weight.shape[1] // self.group
        stored = source.reader.integers(name) if isinstance(source.reader, DenseView) else None
        if stored is not None and stored[0] <= self.bits and stored[2].shape[1] == groups:
            _, codes, scale = stored
        elif self.group is None:
            codes, row_scale = quantize_rows(weight)
            scale = row_scale[:, None]
        else:
            codes, scales = GroupGrid(self.bits, self.group).quantize(weight)
            scale = scales.values
        grouped = codes.view(len(codes), groups, -1)  # [out, groups, weights of a group]
        # not every kernel takes a negative scale; the lowest integer alone has no positive twin
        turned = (scale < 0) & (grouped.amin(2) > -(2 ** (self.bits - 1)))
        codes = torch.where(turned[:, :, None], -grouped, grouped).view_as(codes)
        # the scale of a group of zeros may be 0, which engines divide by
        scale = torch.where(turned, -scale, scale).masked_fill(grouped.count_nonzero(2) == 0, 1.0)
        return codes, scale.to(self.scale)

    def weight(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The weights that the engine computes with, float32 [out, in]."""
        return codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)

    def to_json(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        """The `quantization_config` of `config.json`."""
        kind = {"type": "int", "symmetric": True}
        strategy = {"strategy": "channel" if self.group is None else "group"}
        weights = {"num_bits": self.bits, **kind, **strategy, "group_size": self.group}
        of_tokens = {"strategy": "token", "group_size": None, "dynamic": True}
        activations = self.activations and {"num_bits": self.activations, **kind, **of_tokens}
        named = "pack-quantized" if self.packed else "int-quantized"
        group = {
            "targets": ["Linear"],
            "weights": {**weights, "dynamic": False},
            "input_activations": activations,
            "output_activations": None,
            "format": named,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": named,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }


class CompressedTensors:
    """A folder of integers that vLLM, SGLang and transformers with compressed-tensors load."""

    name: ClassVar[str] = "compressed-tensors"
    types: ClassVar[tuple[str, ...]] = ("w8a8", "w4a16", "w8a16")

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write the folder, one tensor in memory at a time, in as many files as the source has."""
        linears = folder.decoder_linears(source)
        if type == "w4a16":
            group = _group_of(source, linears, progress)
            scheme = Scheme(4, computed_dtype(source.folder), group)
        else:
            scheme = Scheme(8, torch.float32, activations=8 if type == "w8a8" else None)
        files = source.reader.by_file().values()
        shards = {
            shard_name("model", number, len(files)): _planned(linears, scheme, own)
            for number, own in enumerate(files, 1)
        }
        changes = {"quantization_config": scheme.to_json(linears.others)}
        folder.copy_the_rest(source, changes, output, sum(map(size_of, shards.values())))
        made, exact = Exported(), 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            nonlocal exact
            in_order = [name for own in files for name in own]
            for name in each_step(progress, "writing", in_order):
                tensor = source.reader.read(name)
                if name not in linears.shapes:
                    made.count_tensor(str(tensor.dtype).removeprefix("torch."))
                    yield name, tensor
                    continue
                codes, scale = scheme.rounded(source, name, tensor)
                made.count_tensor(f"int{scheme.bits}")
                exact += made.count_matrix(tensor, scheme.weight(codes, scale))
                yield from scheme.tensors(name.removesuffix(".weight"), codes, scale)

        write_shards(output, shards, tensors())
        made.file_bytes = sum((output / file).stat().st_size for file in shards)
        made.notes += _notes_on(source, linears, scheme, len(linears.shapes) - exact)
        return made


def _planned(
    linears: folder.DecoderLinears, scheme: Scheme, entries: Mapping[str, TensorEntry]
) -> Specs:
    """Dtype and shape of what becomes of some tensors of the source."""
    known: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in entries.items():
        if name in linears.shapes:
            known |= scheme.specs(name.removesuffix(".weight"), *linears.shapes[name])
        else:
            known[name] = (entry.dtype, entry.shape)
    return known


def _group_of(source: ExportSource, linears: folder.DecoderLinears, progress: Progress) -> int:
    """The group for 4 bits: the largest that rounds no matrix which is on an int4 grid already."""
    possible = sorted(GROUPS, reverse=True)
    odd = [n for n, (_, columns) in linears.shapes.items() if columns % possible[-1]]
    if odd:
        raise ShapeError(
            f"{len(odd)} of {len(linears.shapes)} matrices have rows that are no multiple of "
            f"{possible[-1]} weights long, so they have no groups for 4 bits",
            where=folder.first_of(odd),
            remedy="export with --type w8a8, or cut to multiples of 32",
        )
    possible = [
        g for g in possible if all(columns % g == 0 for _, columns in linears.shapes.values())
    ]
    best = possible
    for name in each_step(progress, "looking for an int4 grid", linears.shapes):
        weight = source.reader.read(name)
        weight = weight[:: max(1, len(weight) // SAMPLE)]  # every row of few, some of many
        held = [group for group in possible if GroupGrid(4, group).holds(weight)]
        best = [group for group in best if group in held] or best if held else best
    return best[0]


def _notes_on(
    source: ExportSource, linears: folder.DecoderLinears, scheme: Scheme, rounded: int
) -> list[str]:
    """What a user must know about the folder."""
    notes = []
    if rounded:
        better = f"--values int{scheme.bits} --calibration TEXT"
        notes.append(
            f"{rounded} of {len(linears.shapes)} matrices were rounded to the nearest int"
            f"{scheme.bits}; a model that `secateur compress {better}` made needs no rounding here "
            "and loses less"
        )
    if scheme.activations:
        notes.append(f"the engine also rounds activations to int{scheme.activations}")
    odd = [n for n, shape in linears.shapes.items() if any(side % CPU_MULTIPLE for side in shape)]
    if odd:
        notes.append(
            f"vLLM's kernels for CPUs refuse {len(odd)} matrices whose sides are no multiples of "
            f"{CPU_MULTIPLE}, for example {folder.first_of(odd[:1])}"
        )
    if source.config.get("model_type") == MODEL_TYPE:
        notes.append("its layers differ in size, so vLLM needs secateur's plug-in to run it")
    return notes


def _pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Integers int8 [rows, n] as words, int32 [rows, ceil(n · bits / 32)].

    Example:
        >>> import torch
        >>> from secateur.exporting.compressed_tensors import _pack_int32
        >>> _pack_int32(torch.tensor([[-8, -7, -8, -8, -8, -8, -8, -8]], dtype=torch.int8), bits=4)
        tensor([[16]], dtype=torch.int32)
    """
    each = 32 // bits
    shifted = codes.int() + 2 ** (bits - 1)  # unsigned; the sum below is a union of bits
    padded = torch.nn.functional.pad(shifted, (0, -codes.shape[1] % each))
    places = torch.arange(each, dtype=torch.int32) * bits
    return (padded.view(len(codes), -1, each) << places).sum(2, dtype=torch.int32)


targets.register(CompressedTensors.name)(CompressedTensors())
