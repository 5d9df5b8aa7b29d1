"""2:4 semi-structured: matrices that torch multiplies on the sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import NumericalError, PatternError
from secateur.exporting import Exported, ExportSource, targets
from secateur.exporting.folder import copy_the_rest
from secateur.exporting.linears import decoder_linears, first_of
from secateur.models.shard_writer import ShardWriter
from secateur.progress import Progress
from secateur.runtime.semi_structured import (
    COLUMNS,
    FILE_NAME,
    ROWS,
    decode,
    encode,
    is_two_of_four,
    part_specs,
)

__all__ = ["SemiStructured"]

TYPES = MappingProxyType({"bf16": torch.bfloat16, "f16": torch.float16})


@dataclass(frozen=True)
class SemiStructured:
    """A folder that `secateur.load_semi_structured` loads on a GPU.

    All linears of the decoder layers must be 2:4. Those whose sides torch cannot multiply stay
    dense.
    """

    name: ClassVar[str] = "semi-structured"
    types: ClassVar[tuple[str, ...]] = tuple(TYPES)
    lossy: ClassVar[frozenset[str]] = frozenset()

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write one file, one tensor in memory at a time; the source is read twice."""
        linears, dtype = decoder_linears(source), TYPES[type]
        refuse_others(source, tuple(linears.shapes), progress)
        fitting = {
            n
            for n, (out, columns) in linears.shapes.items()
            if not (out % ROWS or columns % COLUMNS)
        }
        known: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, entry in source.reader.entries.items():
            owner = linears.names[name].removesuffix(".weight")
            if name in fitting:
                known |= part_specs(owner, *linears.shapes[name], dtype)
            else:
                kept = dtype if entry.dtype.is_floating_point else entry.dtype
                known[linears.names[name]] = (kept, entry.shape)
        copy_the_rest(source, {"dtype": str(dtype).removeprefix("torch.")}, output)
        made, rounded = Exported(), 0
        progress.start("writing", len(source.reader.entries))
        with ShardWriter(output / FILE_NAME, known, [], {"format": "pt"}) as writer:
            for name in source.reader.entries:
                tensor = source.reader.read(name)
                stored = cast(tensor, dtype, name)
                if name in fitting:
                    owner = linears.names[name].removesuffix(".weight")
                    packed, meta = encode(stored)
                    writer.write(f"{owner}.packed", packed)
                    writer.write(f"{owner}.meta", meta)
                    stored = decode(packed, meta)
                else:
                    writer.write(linears.names[name], stored)
                made.count_tensor("2:4" if name in fitting else type)
                if name in linears.shapes:
                    rounded += not made.count_matrix(tensor, stored)
                progress.step(note=name)
            writer.close({"format": "pt"})
        progress.finish()
        made.file_bytes = (output / FILE_NAME).stat().st_size
        if rounded:
            made.notes.append(f"{rounded} of {len(linears.shapes)} matrices were rounded to {type}")
        odd = [name for name in linears.shapes if name not in fitting]
        if odd:
            made.notes.append(
                f"{len(odd)} matrices stay dense, because torch multiplies 2:4 only in multiples "
                f"of {ROWS} × {COLUMNS}: {first_of(odd)}"
            )
        made.notes.append("its speed on a GPU was never measured here")
        return made


def refuse_others(source: ExportSource, linears: tuple[str, ...], progress: Progress) -> None:
    """Refuse a model with linears that are not 2:4.

    Raises:
        PatternError: names them.
    """
    progress.start("checking the pattern", len(linears))
    odd = []
    for name in linears:
        if not is_two_of_four(source.reader.read(name)):
            odd.append(name)
        progress.step(note=name)
    progress.finish()
    if odd:
        raise PatternError(
            f"{len(odd)} of {len(linears)} matrices keep more than 2 of some 4 weights",
            where=first_of(odd),
            remedy="prune the model with --pattern 2:4",
        )


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A floating-point tensor in another dtype.

    Raises:
        NumericalError: a weight is too large.
    """
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    lost = int((torch.isinf(stored) & torch.isfinite(tensor)).sum())
    if lost:
        raise NumericalError(
            f"{lost} of {tensor.numel()} weights are too large for float16",
            where=name,
            remedy="export with --type bf16",
        )
    return stored


targets.register(SemiStructured.name)(SemiStructured())
