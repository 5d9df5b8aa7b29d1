"""Semi-structured: matrices that torch multiplies on the sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import NumericalError, PatternError
from secateur.exporting import Exported, ExportSource, folder, targets
from secateur.models.checkpoint import PLAIN, ShardWriter, size_of
from secateur.progress import Progress, each_step
from secateur.runtime.semi_structured import layout

TYPES = MappingProxyType({"bf16": torch.bfloat16, "f16": torch.float16})
PATTERNS = ("2:4", "6:8")
"""The patterns that can be stored."""


class SemiStructured:
    """A folder that `secateur.load_semi_structured` loads on a GPU.

    All linears of the decoder layers must be 2:4 or 6:8. Those whose sides torch cannot
    multiply stay dense.
    """

    name: ClassVar[str] = "semi-structured"
    types: ClassVar[tuple[str, ...]] = tuple(TYPES)

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write one file, one tensor in memory at a time; the source is read twice."""
        linears, dtype = folder.decoder_linears(source), TYPES[type]
        stored = _stored_as(source, linears, progress)
        known = _known_specs(source, linears, stored, dtype)
        changes = {"dtype": str(dtype).removeprefix("torch.")}
        folder.copy_the_rest(source, changes, output, size_of(known))
        made, rounded = Exported(), 0
        with ShardWriter(output / layout.FILE_NAME, known, [], PLAIN) as writer:
            for name in each_step(progress, "writing", source.reader.entries):
                tensor, own = source.reader.read(name), linears.names[name]
                value = _cast(tensor, dtype, name)
                if name in stored:
                    parts = _encoded(value, stored[name])
                    for part, content in parts.named(own.removesuffix(".weight")).items():
                        writer.write(part, content)
                    value = parts.dense
                else:
                    writer.write(own, value)
                made.count_tensor(stored.get(name, type))
                if name in linears.shapes:
                    rounded += not made.count_matrix(tensor, value)
            writer.close(PLAIN)
        made.file_bytes = (output / layout.FILE_NAME).stat().st_size
        if rounded:
            made.notes.append(f"{rounded} of {len(linears.shapes)} matrices were rounded to {type}")
        odd = [name for name in linears.shapes if name not in stored]
        if odd:
            made.notes.append(
                f"{len(odd)} matrices stay dense, because torch multiplies 2:4 only in multiples "
                f"of {layout.ROWS} × {layout.COLUMNS}: {folder.first_of(odd)}"
            )
        made.notes.append("its speed on a GPU was never measured here")
        return made


def _stored_as(
    source: ExportSource, linears: folder.DecoderLinears, progress: Progress
) -> Mapping[str, str]:
    """The pattern of every linear that is stored in parts: the first of `PATTERNS` it has."""
    found: dict[str, str] = {}
    for name in each_step(progress, "checking the pattern", linears.shapes):
        weight = source.reader.read(name)
        fits = (p for p in PATTERNS if layout.is_n_of_m(weight, *map(int, p.split(":"))))
        found[name] = next(fits, "")
    odd = [name for name, pattern in found.items() if not pattern]
    if odd:
        raise PatternError(
            f"{len(odd)} of {len(found)} matrices are not {', '.join(PATTERNS)}: they keep more "
            "of some block, or a row is no whole number of blocks",
            where=folder.first_of(odd),
            remedy="prune the model with --pattern 2:4 or 6:8",
        )
    return {
        name: pattern
        for name, pattern in found.items()
        if not (
            linears.shapes[name][0] % layout.ROWS
            or _wide_columns(pattern, linears.shapes[name][1]) % layout.COLUMNS
        )
    }


def _known_specs(
    source: ExportSource,
    linears: folder.DecoderLinears,
    stored: Mapping[str, str],
    dtype: torch.dtype,
) -> layout.Specs:
    """Dtype and shape of everything in the file."""
    known: layout.Specs = {}
    for name, entry in source.reader.entries.items():
        own = linears.names[name]
        if name in stored:
            (out, columns), pattern = linears.shapes[name], stored[name]
            wide = _wide_columns(pattern, columns)
            owner, lifted = own.removesuffix(".weight"), pattern == "6:8"
            known |= layout.part_specs(owner, out, wide, dtype, split=lifted)
        else:
            known[own] = (dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)
    return known


def _wide_columns(pattern: str, in_features: int) -> int:
    """Columns of the 2:4 matrix of a pattern."""
    return layout.lifted_columns(in_features) if pattern == "6:8" else in_features


def _encoded(weight: Tensor, pattern: str) -> layout.StoredParts:
    """The parts of a weight."""
    columns = weight.shape[1]
    if pattern == "2:4":
        return layout.StoredParts.of(weight, columns)
    return layout.StoredParts.of(layout.split(weight), columns, layout.window_columns(columns))


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A floating-point tensor in another dtype."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    # float16 ends at 65504
    lost = int((torch.isinf(stored) & torch.isfinite(tensor)).sum())
    if lost:
        raise NumericalError(
            f"{lost} of {tensor.numel()} weights are too large for float16",
            where=name,
            remedy="export with --type bf16",
        )
    return stored


targets.register(SemiStructured.name)(SemiStructured())
