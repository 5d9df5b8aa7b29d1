"""Exact counts: prune exactly the given number of weights, also when scores are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn

from secateur.errors import PatternError
from secateur.parallel.ranks import ALONE, Ranks

# Up to this many scores a row, comparing all pairs is faster than any selection (measured: 2.7 ms
# against 6 ms for 221 000 groups of 4, equal at about 10).
_PAIRWISE_WIDTH = 8
# Rows are handled in chunks of about this many scores, so that temporaries stay small and in cache.
_CHUNK = 2**19
# From this many scores per row on, a sample shows where the threshold must be.
_SAMPLED_WIDTH = 2**16
_SAMPLE = 2**13
# Of 32 bits: the lowest of each pass, and how many values its bits have.
_PASSES = ((21, 2**11), (10, 2**11), (0, 2**10))


def keep_largest(score: Float32[Tensor, "groups n"], pruned: int) -> Bool[Tensor, "groups n"]:
    """Mask of the largest scores of each row: exactly `pruned` entries of every row are False.

    Among equal scores the one with the lower index is pruned first, as in a stable ascending sort.
    Infinite scores are ordered as numbers. NaN has no order, so the caller must refuse it (the
    patterns do).

    Args:
        score: float32 [groups, n]; each row is one competition.
        pruned: how many entries of each row to prune, 0 <= pruned <= n.

    Returns:
        bool [groups, n], True = kept.

    Raises:
        PatternError: more entries are to be pruned than there are.

    Example:
        >>> import torch
        >>> from secateur.sparsity.exact_count import keep_largest
        >>> keep_largest(torch.tensor([[2.0, 1.0, 2.0]]), 2)
        tensor([[False, False,  True]])
    """
    groups, n = score.shape
    if not 0 <= pruned <= n:
        raise PatternError(f"cannot prune {pruned} of {n} weights")
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    if pruned in (0, n):
        return keep.fill_(pruned == 0)
    # On a GPU all rows at once: there chunks are only more launches.
    select = _by_pairs if n <= _PAIRWISE_WIDTH else _by_threshold
    # Chunks of rows never cut a competition in two. Long rows are worked on alone.
    rows = max(1, _CHUNK // n if n < _SAMPLED_WIDTH else 1) if score.is_cpu else groups
    for start in range(0, groups, rows):
        keep[start : start + rows] = select(score[start : start + rows].detach(), pruned)
    return keep


def _by_pairs(score: Tensor, pruned: int) -> Tensor:
    """For short rows: rank every entry by comparing it with all others of its row."""
    columns = score.unbind(1)  # comparing strided columns costs less than transposing them first
    # How many entries of its row are pruned before each, [n, groups]; below 8, so int8 is enough.
    rank = torch.zeros((len(columns), len(score)), dtype=torch.int8, device=score.device)
    for later in range(1, len(columns)):
        for i in range(later):
            larger = columns[later] >= columns[i]  # on a tie, i comes first
            rank[later] += larger
            rank[i] += larger.logical_not_()
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for column, place in zip(keep.unbind(1), rank, strict=True):
        torch.ge(place, pruned, out=column)
    return keep


def _by_threshold(score: Tensor, pruned: int) -> Tensor:
    """For long rows: keep scores above the `pruned`-th smallest, then decide the ties."""
    if score.is_cpu:
        threshold = torch.from_numpy(_smallest(score.numpy(), pruned))
    elif score.shape[1] >= _SAMPLED_WIDTH:
        threshold = _smallest_by_histogram(score, pruned)
    else:
        threshold = torch.kthvalue(score, pruned, dim=1, keepdim=True).values
    # Strictly above: those that equal the threshold are kept only as far as the count allows.
    keep = score > threshold
    missing = (score.shape[1] - pruned) - _count(keep)
    tied_rows = missing.nonzero()[:, 0]
    if len(tied_rows):
        keep[tied_rows] |= _last_ties(score[tied_rows] == threshold[tied_rows], missing[tied_rows])
    return keep


def _smallest(score: Any, pruned: int) -> Any:
    """The `pruned`-th smallest entry of each row [groups, n], as [groups, 1]; on the CPU."""
    if score.shape[1] >= _SAMPLED_WIDTH:
        return np.stack([_smallest_by_sample(row, pruned) for row in score])
    # numpy's partition is 2.5 to 5 times as fast as torch.kthvalue and 10 times as a sort.
    return np.partition(score, pruned - 1, axis=1)[:, pruned - 1 : pruned].copy()


def _smallest_by_sample(row: Any, pruned: int) -> Any:
    """The `pruned`-th smallest entry, searched among the entries near it in a sample of the row.

    If the sample is misleading, the whole row is partitioned, so the answer is always exact. 1.6 ms
    against 8 ms for 885 000 scores.
    """
    # Every k-th entry: no random numbers, so the same work every time.
    sample = np.sort(row[:: len(row) // _SAMPLE])
    middle = pruned / len(row) * len(sample)
    margin = 2 * len(sample) ** 0.5  # four standard deviations of the place of a median
    low, high = sample[np.clip([middle - margin, middle + margin], 0, len(sample) - 1).astype(int)]
    near = row[(row >= low) & (row <= high)]
    place = pruned - 1 - np.count_nonzero(row < low)  # its place among the entries near it
    if not 0 <= place < len(near):
        near, place = row, pruned - 1
    return np.partition(near, place)[place : place + 1]


def _smallest_by_histogram(score: Tensor, pruned: int, ranks: Ranks = ALONE) -> Tensor:
    """The `pruned`-th smallest entry of each row [groups, n], as [groups, 1].

    Of several processes each has a part of the columns. On a GPU `torch.kthvalue` gives a whole row
    to one multiprocessor. Here all of them count how many entries begin with which bits, in three
    passes over fewer and fewer entries: read as an integer, with the other bits of negative numbers
    turned around, a float has its place in the order.
    """
    keys = _in_order(score.view(torch.int32))
    # The row of each entry that is left, and the place of the sought one among those of each row.
    row = torch.arange(len(score), dtype=torch.int32, device=score.device)[:, None]
    place, smallest = torch.full(row.shape, pruned - 1, device=score.device), torch.zeros_like(row)
    for shift, digits in _PASSES:
        # The first 11 bits have the sign, so they begin at −2¹⁰; bins begin at 0.
        lowest = -(2**10) if shift == _PASSES[0][0] else 0
        bins = (keys >> shift) - lowest if lowest else (keys >> shift) & digits - 1
        bins += row * digits  # every row has bins of its own
        counts = torch.bincount(bins.flatten(), minlength=place.numel() * digits)
        ranks.total(counts)
        # How many entries are before each bin, [groups, digits + 1].
        before = nn.functional.pad(counts.view(-1, digits).cumsum(1), (1, 0))
        found = (before[:, 1:] <= place).sum(1, keepdim=True)  # so many bins end before the entry
        place -= before.gather(1, found)
        smallest += (found.int() + lowest) << shift
        wanted = found[:, 0] + torch.arange(len(found), device=found.device) * digits
        left = (bins == wanted[row]).flatten().nonzero()[:, 0]
        keys, row = keys.flatten()[left], row.expand_as(bins).flatten()[left]
    return _in_order(smallest).view(torch.float32)


def keep_largest_of_all(
    score: Float32[Tensor, " own"], entries: int, pruned: int, ranks: Ranks
) -> Bool[Tensor, " own"]:
    """As `keep_largest` for one row, of which each process has a part, in the order of processes.

    Args:
        score: float32 [own], the part of this process.
        entries: how many there are in all processes.
        pruned: how many of them to prune.
        ranks: the processes.

    Returns:
        bool [own], True = kept.
    """
    if pruned in (0, entries):
        return torch.full_like(score, pruned == 0, dtype=torch.bool)
    limit = _smallest_by_histogram(score.detach()[None], pruned, ranks)[0]
    above, tied = score > limit, score == limit
    counts = torch.zeros(1 + ranks.count, dtype=torch.int64, device=score.device)
    counts[0], counts[1 + ranks.rank] = above.sum(), tied.sum()
    ranks.total(counts)
    largest, *ties = counts.tolist()
    # Among ties the lower index is pruned first, so those of earlier processes go first.
    gone = sum(ties) - (entries - pruned - largest) - sum(ties[: ranks.rank])
    above[tied.nonzero()[max(gone, 0) :, 0]] = True
    return above


def _in_order(bits: Tensor) -> Tensor:
    """Integers in the order of the floats with these bits, and back; int32. −0 is just below 0."""
    # Of a negative float all bits but the sign are turned around; >> 31 is all ones for it.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _last_ties(equal: Tensor, kept: Tensor) -> Tensor:
    """The last `kept` True entries of each row, since lower indices are pruned first."""
    pruned = _count(equal) - kept
    if len(equal) == 1:  # one huge row: list the ties, an index for every entry would be far larger
        positions = equal[0].nonzero()[:, 0]
        return torch.zeros_like(equal).index_fill_(1, positions[int(pruned) :], True)
    # The number of a tie within its row, from 1: the first `pruned` of them go.
    return equal & (equal.cumsum(1, dtype=torch.int32) > pruned[:, None])


def _count(mask: Tensor) -> Tensor:
    """True entries per row; numpy counts bytes 9 times as fast as torch on the CPU."""
    if mask.is_cpu:
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(1)
