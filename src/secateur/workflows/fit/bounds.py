"""The bounds of a fit on bytes, checked by arithmetic before any work."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.recipes.fit import FitRecipe, bytes_of
from secateur.runtime.choice import DEFAULT_GROUP
from secateur.runtime.formats import GRID_BITS, Layout, formats
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.fit.kinds import KINDS, LevelKind

__all__ = ["MARGIN", "as_seen", "check_feasible", "least_bytes", "other_bytes", "size_of"]

MARGIN = 0.003
"""Of a budget, kept free: a mix that is made has a few zeros more or fewer than its levels."""

HEADER_BYTES = 900
"""Of a matrix in the headers of the files, at most."""


def other_bytes(reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]) -> int:
    """Bytes of everything that is no linear: int8 embeddings, norms in bfloat16, headers."""
    total = 4096
    for name, entry in reader.entries.items():
        matrix = matrices.get(name)
        count = entry.size_bytes // entry.dtype.itemsize
        if matrix is None:
            total += count * min(entry.dtype.itemsize, 2)
        elif matrix.prunable:
            total += HEADER_BYTES
        else:
            total += count + 4 * entry.shape[0]
    return total


def least_bytes(reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]) -> int:
    """The smallest size of all linears that the levels allow, by arithmetic, and the margin."""
    shapes = [as_seen(reader, n, m) for n, m in matrices.items() if m.prunable]
    exact = sum(min(size_of(shape, kind) for kind in KINDS) for shape in shapes)
    return ceil(exact / (1 - MARGIN) ** 2)


def as_seen(reader: CheckpointReader, name: str, matrix: PackableMatrix) -> tuple[int, int]:
    """The shape [out, in] of a stored matrix."""
    first, second = reader.entries[name].shape
    return (second, first) if matrix.transposed else (first, second)


def size_of(shape: tuple[int, int], kind: LevelKind) -> int:
    """Bytes of a matrix on a level: the smaller one of bitmask and dense."""
    group = DEFAULT_GROUP if kind.values in GRID_BITS else None
    nonzeros = round(shape[0] * shape[1] * (1 - kind.sparsity))
    names = ("dense", "bitmask") if kind.sparsity else ("dense",)
    layouts = [Layout(name, kind.values, shape, group=group) for name in names]
    return min(formats[layout.format].nbytes(layout, nonzeros) for layout in layouts)


def check_feasible(recipe: FitRecipe, least: int, source: int) -> None:
    """Refuse a size that no level can reach, or that asks for nothing, before any work.

    Args:
        recipe: gives the bounds.
        least: the smallest size that is possible.
        source: bytes of the model's weight files.

    Raises:
        RecipeError: names the sizes that are possible.
    """
    wanted = None if recipe.max_size is None else bytes_of(recipe.max_size)
    if wanted is not None and wanted >= source and recipe.max_loss_increase is None:
        raise RecipeError(
            f"the model has {source / 2**20:.1f}MiB, so it fits into {recipe.max_size} as it is",
            where="max_size",
            remedy=f"leave it, or give a size from {least / 2**20:.1f}MiB on",
        )
    if wanted is not None and wanted < least:
        raise RecipeError(
            f"no level fits into {recipe.max_size}",
            where="max_size",
            remedy=f"the smallest possible size is {least / 2**20:.1f}MiB; or cut the model first "
            "with `secateur structure`",
        )
