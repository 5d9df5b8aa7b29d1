"""How a matrix for sparse tensor cores is stored.

A linear NAME whose weight [out, in] keeps at most 2 of every 4 consecutive weights is stored as

    NAME.packed    the 2 weights of every 4, float16 or bfloat16 [out, in / 2]
    NAME.meta      their places, 2 bits each, in CUTLASS' order, int16 [out, in / 16]

in the file `semi_structured.safetensors`: 9 bits for each weight. transformers does not look for
this name, so it never draws such matrices at random. All other tensors are plain.
`torch.sparse.SparseSemiStructuredTensorCUTLASS` takes both parts as they are, so nothing is encoded
on the GPU.

A 6:8 weight (so also 4:8) is first written as a 2:4 matrix [out, lifted] that is 1.5 times as wide,
so that sparse tensor cores multiply it exactly (SlideSparse, arXiv:2603.05232). `packed` and `meta`
are those of the wider matrix, and there is a third part:

    NAME.columns   the column of the weight that each wide column is from, int32 [lifted]

A block of 8 columns is covered by 3 windows: 0–3, 2–5 and 4–7. A column may be in two windows, and
each kept weight goes to one of them: each window takes the first two that are left. So no window
has more than 2, and no weight is left over, because a block keeps at most 6. The windows side by
side are multiplied with activations whose columns are repeated alike:

    y = W x = W' x[columns],    W' [out, lifted],    lifted = 1.5 · in

2:4 products are at most 2 × as fast as dense ones; 1.5 × as wide, that leaves 1.33 ×.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.errors import PatternError

FILE_NAME = "semi_structured.safetensors"
ROWS, COLUMNS = 32, 64
"""torch multiplies matrices whose sides are multiples of these."""

VALUES = (torch.bfloat16, torch.float16)
"""The dtypes of weights: float32 has another pattern on these cores (1:2)."""

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors, by name."""


@dataclass(frozen=True)
class StoredParts:
    """A weight [out, in] as it is stored.

    Attributes:
        in_features: in.
        packed: see above, as the other parts.
        meta: the places.
        columns: None where the weight is 2:4 itself.
    """

    in_features: int
    packed: Tensor
    meta: Tensor
    columns: Tensor | None = None

    @classmethod
    def of(cls, wide: Tensor, in_features: int, columns: Tensor | None = None) -> StoredParts:
        """Encode a 2:4 matrix, on any device.

        Args:
            wide: the matrix, float16 or bfloat16 [out, lifted]; [out, in] without `columns`.
            in_features: in.
            columns: from `window_columns`; None for 2:4 itself.
        """
        from torch.sparse import _semi_structured_conversions as theirs

        packed, meta = theirs.sparse_semi_structured_from_dense_cutlass(wide.contiguous())
        return cls(in_features, packed, meta, columns)

    @property
    def nbytes(self) -> int:
        """Their memory."""
        return sum(part.nbytes for part in self.named("").values())

    @property
    def wide(self) -> Tensor:
        """The 2:4 matrix [out, lifted]; torch's reference computes it on any device."""
        from torch.sparse import _semi_structured_conversions as theirs

        wide: Tensor = theirs.sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)
        return wide

    @property
    def dense(self) -> Tensor:
        """The weight [out, in]. Exact: of the wide columns of a weight, all but one are zero."""
        if self.columns is None:
            return self.wide
        empty = self.packed.new_zeros(len(self.packed), self.in_features)
        return empty.index_add_(1, self.columns, self.wide)

    def named(self, name: str) -> Mapping[str, Tensor]:
        """The parts under the names in the file."""
        found = {f"{name}.packed": self.packed, f"{name}.meta": self.meta}
        return found if self.columns is None else {**found, f"{name}.columns": self.columns}


def lifted(x: Tensor, columns: Tensor | None) -> Tensor:
    """Activations [tokens, in] as the wide matrix takes them: [tokens, lifted]."""
    return x if columns is None else x.index_select(1, columns)


def part_specs(name: str, out: int, lifted: int, dtype: torch.dtype, *, split: bool) -> Specs:
    """Dtype and shape of the parts of a linear.

    Args:
        name: of the linear.
        out: rows.
        lifted: columns of the wide matrix.
        dtype: of the weights.
        split: whether the weight is another one than the wide matrix.
    """
    specs: Specs = {
        f"{name}.packed": (dtype, (out, lifted // 2)),
        f"{name}.meta": (torch.int16, (out, lifted // 16)),
    }
    return {**specs, f"{name}.columns": (torch.int32, (lifted,))} if split else specs


def is_n_of_m(weight: Tensor, n: int, m: int) -> bool:
    """Whether every m consecutive weights of a row keep at most n."""
    if weight.shape[1] % m:
        return False
    return int(weight.view(len(weight), -1, m).count_nonzero(2).max()) <= n


WINDOWS = (0, 2, 4)
"""The first of the 4 columns of each window of a block of 8."""


def lifted_columns(in_features: int) -> int:
    """Columns of the 2:4 matrix of a 6:8 weight: a multiple of 64; zeros fill it up."""
    return -(-in_features * 12 // 8 // COLUMNS) * COLUMNS


def window_columns(in_features: int) -> Tensor:
    """The column of a 6:8 weight that each wide column is from, int32 [lifted].

    Columns of zeros are from column 0.
    """
    places = (torch.tensor(WINDOWS)[:, None] + torch.arange(4)).flatten()
    found = (torch.arange(0, in_features, 8)[:, None] + places).flatten().int()
    return pad(found, (0, lifted_columns(in_features) - len(found)))


def split(weight: Tensor) -> Tensor:
    """The wide 2:4 matrix [out, lifted] of a 6:8 weight [out, in].

    Raises:
        PatternError: it is not 6:8.
    """
    if not is_n_of_m(weight, 6, 8):
        raise PatternError("a block of 8 weights keeps more than 6, or is not whole")
    # [out, blocks, 8]; `left` is what no window has taken yet
    blocks = weight.view(len(weight), -1, 8)
    left, parts = blocks != 0, []
    for first in WINDOWS:
        window = slice(first, first + 4)
        taken = left[..., window] & (left[..., window].cumsum(-1) <= 2)
        left[..., window] &= ~taken
        parts.append(torch.where(taken, blocks[..., window], 0))
    wide = torch.stack(parts, 2).flatten(1)  # [out, blocks, window, 4]
    return pad(wide, (0, lifted_columns(weight.shape[1]) - wide.shape[1]))
