"""The stored parts of a matrix, weight by weight from docs/format.md, on Python lists."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction

import torch


def is_kept(value: torch.Tensor) -> bool:
    """Whether any bit of a weight is 1."""
    return any(value.reshape(1).view(torch.uint8).tolist())


def bitmask_of(weight: torch.Tensor) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The bytes of the mask, row by row, and the places of the kept weights in order."""
    rows, places = [], []
    for i in range(weight.shape[0]):
        row = [0] * -(-weight.shape[1] // 8)
        for j in range(weight.shape[1]):
            if is_kept(weight[i, j]):
                row[j // 8] += 2 ** (j % 8)
                places.append((i, j))
        rows.append(row)
    return rows, places


def sets_in_order(kept: int, group: int) -> list[tuple[int, ...]]:
    """All sets of N of M positions, by their last position, then the one before it, and so on."""
    every = itertools.combinations(range(group), kept)
    return sorted(every, key=lambda positions: positions[::-1])


def codes_of(
    weight: torch.Tensor, kept: int, group: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The bytes of the codes, row by row, and the places of the kept weights in order."""
    order = {positions: rank for rank, positions in enumerate(sets_in_order(kept, group))}
    bits = 0
    while 2**bits < len(order):
        bits += 1
    rows, places = [], []
    for i in range(weight.shape[0]):
        stream = []
        for start in range(0, weight.shape[1], group):
            chosen = [j for j in range(group) if is_kept(weight[i, start + j])]
            chosen += [j for j in range(group) if j not in chosen][: kept - len(chosen)]
            code = order[tuple(sorted(chosen))]
            stream += [code // 2**place % 2 for place in range(bits)]
            places += [(i, start + j) for j in sorted(chosen)]
        stream += [0] * (-len(stream) % 8)
        rows.append([
            sum(bit << place for place, bit in enumerate(stream[k : k + 8]))
            for k in range(0, len(stream), 8)
        ])  # fmt: skip
    return rows, places


def as_float32(value: float | Fraction) -> float:
    """The nearest float32."""
    return struct.unpack("<f", struct.pack("<f", float(value)))[0]


def int8_row(row: list[float]) -> tuple[list[int], float]:
    """The integers of a row and its scale; quotients in float32, as the specification has it."""
    peak = max((abs(value) for value in row), default=0.0)
    scale = 1.0 if peak == 0 else max(as_float32(peak / 127), 2.0**-126)
    integers = [round(as_float32(value / scale)) for value in row]
    return [max(-127, min(127, x)) for x in integers], scale
