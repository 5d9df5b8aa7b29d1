"""How a matrix for sparse tensor cores is stored.

A linear NAME whose weight [out, in] keeps at most 2 of every 4 consecutive weights is stored as

    NAME.packed    the 2 weights of every 4, float16 or bfloat16 [out, in / 2]
    NAME.meta      their places, 2 bits each, in CUTLASS' order, int16 [out, in / 16]

in the file `semi_structured.safetensors`: 9 bits for each weight. transformers does not look for
this name, so it never draws such matrices at random. All other tensors are plain.
`torch.sparse.SparseSemiStructuredTensorCUTLASS` takes both parts as they are, so nothing is encoded
on the GPU.

A weight of another pattern is first written as a wider 2:4 matrix [out, lifted]. Then `packed` and
`meta` are those of the wider matrix, and there is a third part:

    NAME.columns   the column of the weight that each wide column is from, int32 [lifted]

so the product of the weight and x is that of the wide matrix and x[columns].

Milder patterns are rewritten as 2:4, so that sparse tensor cores multiply them exactly. A block of
consecutive weights is covered by windows of 4 columns. A column may be in two windows, and each
kept weight goes to one of them, so that no window gets more than 2. The windows side by side are a
2:4 matrix, wider than the weight, which is multiplied with activations whose columns are repeated
alike:

    y = W x = W' x[columns],    W' [out, lifted],    lifted = in · 4 · windows / block

Which windows can take every pattern follows from Hall's theorem: k windows must be the only ones of
at most 2k columns, for every k below half of the kept weights.

| pattern    | windows of a block                                                 | lifted / in |
|------------|--------------------------------------------------------------------|-------------|
| (2N−2):2N  | N − 1 that overlap by 2: 0–3, 2–5, 4–7 for 6:8                     | 1.5 for 6:8 |
| 8:16       | 0–3, 4–7, 8–11, 12–15, and the third and the fourth columns of these | 1.5       |

For (2N−2):2N this is SlideSparse (arXiv:2603.05232). 8:16 is not of that family, and 5 windows of
4 cannot take it: they have 20 places for 16 columns, so at least 12 columns are in one window
only, and one window of the 5 then is the only one of 3. So 8:16, which keeps half, is as wide as
6:8, which keeps three quarters. 4:8 needs 3 windows too, and is stored as 6:8.

2:4 products are at most 2 × as fast as dense ones. 1.5 × as wide, that leaves 1.33 ×.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.errors import PatternError, ShapeError

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
            columns: the columns of the weight in each place of the windows; None for 2:4 itself.
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


@dataclass(frozen=True)
class Splitting:
    """Windows that take every pattern of some n:m.

    Args:
        n: the most kept weights of a block.
        m: columns of a block.
        windows: the 4 columns of each window.
    """

    n: int
    m: int
    windows: tuple[tuple[int, int, int, int], ...]

    @property
    def name(self) -> str:
        """The pattern."""
        return f"{self.n}:{self.m}"

    def lifted(self, in_features: int) -> int:
        """Columns of the wide matrix: a multiple of 64; zeros fill it up."""
        places = in_features // self.m * 4 * len(self.windows)
        return -(-places // COLUMNS) * COLUMNS

    def columns(self, in_features: int) -> Tensor:
        """The column of the weight that each wide column is from, int32 [lifted].

        Columns of zeros are from column 0.

        Raises:
            ShapeError: rows are no whole number of blocks.
        """
        if in_features % self.m:
            raise ShapeError(f"{in_features} columns are no whole number of blocks of {self.m}")
        places = torch.tensor(self.windows, dtype=torch.int32).flatten()
        blocks = torch.arange(0, in_features, self.m, dtype=torch.int32)
        found = (blocks[:, None] + places).flatten()
        return pad(found, (0, self.lifted(in_features) - len(found)))

    def split(self, weight: Tensor) -> Tensor:
        """The wide 2:4 matrix [out, lifted] of a weight [out, in].

        Raises:
            ShapeError: rows are no whole number of blocks.
            PatternError: a block keeps more than n.
        """
        columns = self.columns(weight.shape[1]).to(weight.device)
        if not is_n_of_m(weight, self.n, self.m):
            raise PatternError(f"a block of {self.m} weights keeps more than {self.n}")
        kept = weight.view(len(weight), -1, self.m) != 0
        bits = 2 ** torch.arange(self.m, device=weight.device)
        taken = assignments(self).to(weight.device)[(kept * bits).sum(2)].flatten(1)
        taken = pad(taken, (0, len(columns) - taken.shape[1]))
        return torch.where(taken, weight[:, columns], 0)


def sliding(m: int) -> Splitting:
    """(m − 2):m by windows that overlap by 2."""
    starts = range(0, m - 2, 2)
    return Splitting(m - 2, m, tuple((i, i + 1, i + 2, i + 3) for i in starts))


SPLITTINGS = (
    sliding(8),
    Splitting(
        8, 16,
        ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15),
         (2, 6, 10, 14), (3, 7, 11, 15)),
    ),
)  # fmt: skip
"""Those that are written, in the order in which they are tried."""


@cache
def assignments(splitting: Splitting) -> Tensor:
    """For every set of kept columns, which places of the windows take them: bool [2^m, places].

    Bit j of a row's number is column j. A set that a splitting does not promise to take has none.
    """
    m, windows = splitting.m, splitting.windows
    homes = [[w for w, window in enumerate(windows) if j in window] for j in range(m)]
    owners: dict[int, list[int]] = {0: [-1] * m}
    for code in range(1, 2**m):
        last = code.bit_length() - 1
        before = owners.get(code ^ 1 << last)
        if before is not None and code.bit_count() <= splitting.n:
            owners[code] = list(before)
            if not _give_home(last, homes, owners[code], set()):
                raise PatternError(f"the windows do not take every {splitting.name}")
    codes = torch.tensor(list(owners))
    held = torch.tensor(list(owners.values()))
    table = torch.zeros(2**m, len(windows), 4, dtype=torch.bool)
    for w, window in enumerate(windows):
        table[codes, w] = held[:, list(window)] == w
    return table.flatten(1)


def _give_home(column: int, homes: list[list[int]], owner: list[int], seen: set[int]) -> bool:
    """Put a column into a window; where it is full, one of its two moves (an augmenting path)."""
    for window in homes[column]:
        if window in seen:
            continue
        seen.add(window)
        inside = [c for c, w in enumerate(owner) if w == window]
        if len(inside) < 2 or any(_give_home(c, homes, owner, seen) for c in inside):
            owner[column] = window
            return True
    return False
