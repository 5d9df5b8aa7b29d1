"""A weight matrix in the form that the kernels read.

| part      | bitmask                                   | dense                                |
|-----------|-------------------------------------------|--------------------------------------|
| `values`  | kept weights, row by row                  | all weights [out, words · 64]        |
| `mask`    | bits [out, words · 64], 1 = kept          | none                                 |
| `offsets` | where each row's values begin [out + 1]   | none                                 |
| `scale`   | float32 [out] where values are int8       | the same                             |

words = ⌈in / 64⌉; entries past `in` are zero. Kernels may read 64 bytes past the end of the values,
so that they can load whole registers. All padding happens here, when a matrix is loaded; files have
none. A dense weight whose rows are already whole words is used without a copy.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from secateur.errors import KernelError, ShapeError
from secateur.runtime.kernels.library import MAX_BATCH, TYPES, CMatrix, address, library

__all__ = ["WORD", "KernelMatrix"]

WORD = 64
"""Weights for each word of the mask; rows are padded to whole words."""

READ_AHEAD_BYTES = 64
_BITS_SET = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


class KernelMatrix:
    """A weight [out, in] on the CPU, ready for kernels.

    Args:
        values: kept weights [nonzeros] with a bitmask, otherwise the dense weight [out, in];
            float32, bfloat16, float16 or int8.
        bitmask: uint8 [out, ⌈in / 8⌉], bit j of a row little end first; None if dense.
        scale: float32 [out], for int8: W = scale · values.
        columns: in; needed with a bitmask.

    Raises:
        ShapeError: the parts do not fit each other.
    """

    def __init__(
        self,
        values: Tensor,
        *,
        bitmask: Tensor | None = None,
        scale: Tensor | None = None,
        columns: int | None = None,
    ) -> None:
        self.dtype = values.dtype
        self.rows = values.shape[0] if bitmask is None else bitmask.shape[0]
        self.columns = values.shape[1] if columns is None else columns
        self.words = -(-self.columns // WORD)
        self.scale = None if scale is None else scale.float().contiguous()
        self.mask: Tensor | None = None
        self.offsets: Tensor | None = None
        if (self.dtype == torch.int8) != (scale is not None):
            raise ShapeError(f"{self.dtype} values with{'' if scale is None else ' a'} scale")
        if bitmask is None and self.columns % WORD == 0:
            self.values = values.contiguous().view(-1)
        elif bitmask is None:
            self.values = padded(values, self.rows, self.words * WORD)
        else:
            self.mask = mask_words(bitmask, self.columns, self.words)
            counts = bits_set(self.mask).view(self.rows, -1).sum(1, dtype=torch.int64)
            self.offsets = torch.zeros(self.rows + 1, dtype=torch.int64)
            torch.cumsum(counts, 0, out=self.offsets[1:])
            if int(self.offsets[-1]) != values.numel():
                raise ShapeError(
                    f"the bitmask keeps {int(self.offsets[-1])} weights, but there are "
                    f"{values.numel()} values"
                )
            self.values = padded(values.view(1, -1), 1, values.numel())
        self.c = CMatrix(
            self.rows,
            self.columns,
            self.words,
            self.words * WORD,
            TYPES[self.dtype],
            address(self.values),
            address(self.mask),
            address(self.offsets),
            address(self.scale),
        )
        self.pointer = ctypes.addressof(self.c)

    def __deepcopy__(self, memo: object) -> KernelMatrix:
        """Return the matrix itself: copied models share their matrices, which never change."""
        return self

    @property
    def nonzeros(self) -> int:
        """The number of stored weights."""
        return self.rows * self.columns if self.offsets is None else int(self.offsets[-1])

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        parts = (self.values, self.mask, self.offsets, self.scale)
        return sum(part.nbytes for part in parts if part is not None)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x · Wᵀ, computed by the kernels.

        Args:
            x: [batch, in], 1 ≤ batch ≤ 8, float32 or bfloat16.

        Returns:
            [batch, out] of the dtype of x. bfloat16 values with float32 x are computed in float32.
            With int8 values, x is rounded to int8 with one scale per 256 entries.

        Raises:
            ShapeError: x does not fit the matrix.
            KernelError: there are no kernels here.
        """
        batch, columns = x.shape
        if columns != self.columns or not 1 <= batch <= MAX_BATCH or x.device.type != "cpu":
            raise ShapeError(
                f"x of shape {tuple(x.shape)} on {x.device}, for 1 to {MAX_BATCH} rows of "
                f"{self.columns} on the cpu"
            )
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise ShapeError(f"x is {x.dtype}, but kernels accept float32 or bfloat16")
        x = x.contiguous()
        y = torch.empty(batch, self.rows, dtype=x.dtype)
        status = kernels().sct_linear(
            ctypes.byref(self.c),
            TYPES[x.dtype],
            x.data_ptr(),
            columns,
            y.data_ptr(),
            self.rows,
            batch,
        )
        if status != 0:
            raise no_kernel()
        return y

    def tile(self, begin: int, end: int, out: Tensor | None = None) -> Tensor:
        """Rows [begin, end) as a dense matrix [end − begin, in], for torch.

        int8 values come as bfloat16 integers without their scale.

        Args:
            begin: the first row.
            end: the row after the last.
            out: room for it, from `room`; made if not given.
        """
        if not 0 <= begin < end <= self.rows:
            raise ShapeError(f"rows {begin} to {end} of a matrix of {self.rows}")
        out = self.room(end - begin) if out is None else out
        if kernels().sct_expand(ctypes.byref(self.c), begin, end, out.data_ptr()) != 0:
            raise no_kernel()
        return out[: end - begin, : self.columns]

    @property
    def weight(self) -> Tensor | None:
        """The dense weight [out, in] where it is stored as one, without a scale; else None."""
        if self.mask is not None or self.scale is not None:
            return None
        width = self.words * WORD
        return self.values[: self.rows * width].view(self.rows, width)[:, : self.columns]

    def room(self, rows: int) -> Tensor:
        """Memory for a tile of so many rows."""
        dtype = torch.bfloat16 if self.dtype == torch.int8 else self.dtype
        return torch.empty(rows, self.words * WORD, dtype=dtype)


def kernels() -> ctypes.CDLL:
    """The library, which has to be there.

    Raises:
        KernelError: it is not.
    """
    loaded = library()
    if loaded is None:
        raise no_kernel()
    return loaded


def no_kernel() -> KernelError:
    """What to raise when a kernel says no."""
    return KernelError(
        "no kernel for this processor, or memory ran out",
        remedy="secateur.kernel_info() reports the active tier",
    )


def padded(values: Tensor, rows: int, width: int) -> Tensor:
    """Values [rows, ≤ width] in rows of `width`, zeros between, and room to read past the end."""
    ahead = READ_AHEAD_BYTES // values.element_size()
    flat = torch.zeros(rows * width + ahead, dtype=values.dtype)
    flat[: rows * width].view(rows, width)[:, : values.shape[1]] = values
    return flat


def mask_words(bitmask: Tensor, columns: int, words: int) -> Tensor:
    """Bits [out, ⌈columns / 8⌉] in rows of whole words.

    Raises:
        ShapeError: the width is another, or bits past the columns are set.
    """
    rows, width = bitmask.shape
    if width != -(-columns // 8):
        raise ShapeError(f"a bitmask {width} bytes wide, for {columns} columns")
    if columns % 8 and bool((bitmask[:, -1] >> columns % 8).any()):
        raise ShapeError(f"the bitmask has bits past its {columns} columns")
    out = torch.zeros(rows, words * WORD // 8, dtype=torch.uint8)
    out[:, :width] = bitmask
    return out


def bits_set(mask: Tensor) -> Tensor:
    """How many bits of each byte are set."""
    return _BITS_SET[mask.int()]
