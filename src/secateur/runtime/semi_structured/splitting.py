"""Rewrites milder patterns as 2:4, so that sparse tensor cores multiply them exactly.

A block of consecutive weights is covered by windows of 4 columns. A column may be in two windows,
and each kept weight goes to one of them, so that no window gets more than 2. The windows side by
side are a 2:4 matrix, wider than the weight, which is multiplied with activations whose columns are
repeated alike:

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

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.errors import PatternError, ShapeError
from secateur.runtime.semi_structured.layout import COLUMNS, is_n_of_m


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
            if not give_home(last, homes, owners[code], set()):
                raise PatternError(f"the windows do not take every {splitting.name}")
    codes = torch.tensor(list(owners))
    held = torch.tensor(list(owners.values()))
    table = torch.zeros(2**m, len(windows), 4, dtype=torch.bool)
    for w, window in enumerate(windows):
        table[codes, w] = held[:, list(window)] == w
    return table.flatten(1)


def give_home(column: int, homes: list[list[int]], owner: list[int], seen: set[int]) -> bool:
    """Put a column into a window; where it is full, one of its two moves (an augmenting path)."""
    for window in homes[column]:
        if window in seen:
            continue
        seen.add(window)
        inside = [c for c, w in enumerate(owner) if w == window]
        if len(inside) < 2 or any(give_home(c, homes, owner, seen) for c in inside):
            owner[column] = window
            return True
    return False
