"""Weights of 4 bits in the order in which the kernels read them; `csrc/secateur.h` defines it.

Two rows share bytes: the lower four bits of a byte are a weight of the even row, the upper four one
of the odd row. Columns are in another order than in the file. A block of k words of 64 columns is
16 runs of 4k columns; word j of the block holds columns 4j to 4j + 3 of every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.types import Mask

WORD = 64
LANES = 16
AT_ONCE = 2**22
"""Weights that are bytes at the same time."""


@dataclass(frozen=True)
class PackedCodes:
    """The codes of a matrix for the kernels.

    Args:
        values: uint8; dense [pairs · words · 64], else the kept weights of each pair; then zeros
            that kernels may read.
        mask: uint8 [pairs · words · 2 · 8]; None if dense.
        offsets: where the bytes of each pair begin, int64 [pairs + 1]; None if dense.
        nonzeros: how many weights are stored.
    """

    values: Tensor
    mask: Tensor | None
    offsets: Tensor | None
    nonzeros: int

    @staticmethod
    def dense(codes: Tensor, group: int, ahead: int) -> PackedCodes:
        """All codes of a matrix, int8 [out, in].

        Args:
            codes: −7 to 7.
            group: weights that share a scale.
            ahead: bytes that can be read past the end.
        """
        rows, columns = codes.shape
        pairs, width = -(-rows // 2), words_of(columns) * WORD
        values = torch.zeros(pairs * width + ahead, dtype=torch.uint8)
        for first, turned in turned_rows(codes, group):
            both = (turned[0::2] & 15) | (turned[1::2] << 4)
            values[first // 2 * width :][: both.numel()] = both.view(torch.uint8).view(-1)
        return PackedCodes(values, None, None, rows * columns)

    @staticmethod
    def bitmask(codes: Tensor, kept: Mask, group: int, ahead: int) -> PackedCodes:
        """The kept codes of a matrix.

        Args:
            codes: −7 to 7, int8 [out, in].
            kept: which of them to store, bool [out, in].
            group: weights that share a scale.
            ahead: bytes that can be read past the end.
        """
        rows = len(codes)
        pairs = -(-rows // 2)
        counts = torch.zeros(2 * pairs, dtype=torch.int64)
        counts[:rows] = kept.sum(1)
        offsets = torch.zeros(pairs + 1, dtype=torch.int64)
        torch.cumsum(counts.view(pairs, 2).amax(1), 0, out=offsets[1:])
        values = np.zeros(int(offsets[-1]) + ahead, dtype=np.uint8)
        masks = []
        both = zip(
            turned_rows(codes, group), turned_rows(kept.view(torch.int8), group), strict=True
        )
        for (first, turned), (_, here) in both:
            mask = here.numpy().view(np.bool_)
            masks.append(mask_words(mask))
            for odd in (0, 1):
                count = counts[first + odd : first + len(turned) : 2]
                starts = offsets[first // 2 :][: len(count)]
                to = places(starts, count)
                stored = turned[odd::2].numpy()[mask[odd::2]].view(np.uint8)
                values[to] |= (stored << 4) if odd else (stored & 15)
        return PackedCodes(torch.from_numpy(values), torch.cat(masks), offsets, int(counts.sum()))


def words_of(columns: int) -> int:
    """Words of 64 columns, the last one filled up."""
    return -(-columns // WORD)


def turned_fours(words: int, group: int) -> Tensor:
    """Which four columns, counted in fours, come in each place of a row; int64 [words · 16]."""
    found, at, block = [], 0, min(LANES, group // 4)
    while at < words:
        while block > words - at:
            block //= 2
        natural = torch.arange(block * LANES).view(LANES, block) + at * LANES
        found.append(natural.t().reshape(-1))
        at += block
    return torch.cat(found)


def turned_rows(matrix: Tensor, group: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows of bytes at a time, in the kernels' order of columns.

    Yields:
        The first row, and rows [even, words · 64]: filled up with zeros.
    """
    rows, columns = matrix.shape
    words = words_of(columns)
    order = turned_fours(words, group)
    step = 2 * max(1, AT_ONCE // (2 * words * WORD))
    for first in range(0, rows, step):
        part = matrix[first : first + step]
        filled = torch.zeros(len(part) + len(part) % 2, words * WORD, dtype=torch.int8)
        filled[: len(part), :columns] = part
        turned = filled.view(torch.int32).index_select(1, order)
        yield first, turned.view(torch.int8)


def mask_words(mask: np.ndarray) -> Tensor:
    """Bits of an even number of rows; the words of both rows of a pair alternate."""
    packed = np.packbits(mask, axis=1, bitorder="little")
    pairs = packed.reshape(len(mask) // 2, 2, -1, WORD // 8)
    return torch.from_numpy(np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(-1))


def places(starts: Tensor, counts: Tensor) -> np.ndarray:
    """Runs of counts[i] numbers from starts[i] on, one after the other."""
    before = torch.cumsum(counts, 0) - counts
    total = int(counts.sum())
    return (torch.arange(total) + (starts - before).repeat_interleave(counts)).numpy()
