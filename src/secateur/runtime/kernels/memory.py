"""The memory of a matrix in the form that the kernels read, by arithmetic.

    dense     rows · words · 64 · b / 8
    bitmask   nonzeros · b / 8 + rows · words · 8 + 8 · (rows + 1)

With int8, 4 · rows are added for scales; with int4, a byte for each group of a row and one for each
row, and a bitmask has one offset for two rows. b is the bits of a value; int3 takes 4 in memory.
"""

from __future__ import annotations

from secateur.quantization.groups import GroupGrid
from secateur.runtime.formats import GRID_BITS, VALUES
from secateur.runtime.kernels.matrix import WORD

OFFSET_BYTES = 8


def matrix_bytes(
    shape: tuple[int, int], values: str, sparsity: float = 0.0, group: int | None = None
) -> int:
    """Bytes of a matrix [out, in] in memory.

    Rows are taken to keep equally many weights. In int4 a pair of rows takes as much as the fuller
    one, so others need a little more.

    Args:
        shape: [out, in].
        values: a name in `VALUES`.
        sparsity: the fraction of zeros; 0 for a matrix without a bitmask.
        group: weights of a row that share a scale, for int4 and int3.
    """
    rows, columns = shape
    words = -(-columns // WORD)
    paired = values in GRID_BITS
    bits = 4 if paired else VALUES[values].itemsize * 8
    nonzeros = rows * (columns - round(sparsity * columns)) if sparsity else rows * words * WORD
    total = nonzeros * bits // 8
    if sparsity:
        offsets = -(-rows // 2) if paired else rows
        total += rows * words * WORD // 8 + OFFSET_BYTES * (offsets + 1)
    if values == "int8":
        total += 4 * rows
    if group is not None:
        total += rows * (GroupGrid(4, group).groups(columns) + 1)
    return total
