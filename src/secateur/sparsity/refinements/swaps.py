"""Pair swaps (SparseSwaps): prune a kept weight, restore a pruned one, where the error falls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import PatternError
from secateur.machine import check_finite
from secateur.registry import Count, float32_bytes
from secateur.sparsity.hessian import check_weight
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.refinements import refinement
from secateur.types import Gram, Mask, Statistics, Weight

# Rows swapped together: enough to make the product with the gram efficient, as long as the pairs
# within N:M groups stay below so many entries.
_CHUNK_ROWS = 512
_CHUNK_ENTRIES = 2**24
# The M of N:M up to which `working_bytes` counts the pairs of all these rows.
_USUAL_GROUP = 8
# Columns of the gram that are held in float64 at a time.
_EXACT_COLUMNS = 256
# A swap must lower the error of its row by this share of what it was at first: less is rounding.
_LEAST_GAIN = 1e-6
_NEVER = float("inf")


def _working_bytes(shape: tuple[int, int]) -> int:
    """Three copies of the weight, columns of the gram in float64, the pairs of some rows."""
    pairs = min(_CHUNK_ENTRIES, _CHUNK_ROWS * shape[1] * _USUAL_GROUP)
    columns = 2 * float32_bytes((shape[1], _EXACT_COLUMNS))
    return 3 * float32_bytes(shape) + 2 * columns + 3 * float32_bytes((pairs,))


@refinement(requires={"gram"}, working_bytes=_working_bytes)
def swaps(
    weight: Weight,
    mask: Mask,
    statistics: Statistics,
    pattern: Pattern,
    sparsity: float,
    *,
    swaps: Count = 1000,
    candidates: Count = 16,
) -> Mask:
    """Lowers the error of a mask by exchanging kept and pruned weights within each row.

    With w a row of W, d = w where pruned and 0 where kept, G the gram and c = Gd, the error of the
    row is dᵀGd. Pruning a kept p and restoring a pruned q changes it by

        Δ_pq = (w_p² G_pp + 2 w_p c_p) + (w_q² G_qq − 2 w_q c_q) − 2 w_p w_q G_pq.

    Swaps with Δ < 0 are made until a row has none among its candidates, or has made `swaps` of
    them. Every row, and for N:M every group, keeps its number of zeros, so that the counts of every
    scope are kept as well. The formula assumes that the remaining weights do not change; a solver
    that adjusts them gains less from a swap.

    Paper: Zimmer et al. 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
    arXiv:2512.10922. Deviations: the paper looks at all pairs for every single swap. Here each
    sweep pairs the `candidates` cheapest weights to prune, each with the best of the `candidates`
    cheapest to restore (for N:M the best pair of each of so many groups), and then takes one pair
    after the other, the best first, while all others are corrected by what it changes for them:
    with δ_s = w_p e_p − w_q e_q, taking s adds 2 δ_sᵀGδ_t to Δ_t. So each swap lowers the error by
    exactly its Δ, many are made for one product with G, and c never drifts. If a row's error in
    float64 is higher at the end, which only rounding can cause, the row gets its old mask back.

    Args:
        weight: [out, in] of any floating dtype; computed in float32.
        mask: bool [out, in], one that the pattern allows; True = kept; not changed.
        statistics: with `gram`, float32 [in, in], undamped.
        pattern: unstructured of any scope, or N:M.
        sparsity: the fraction of zeros; checked, the counts are those of the mask.
        swaps: the most swaps in a row.
        candidates: weights to prune, and weights to restore, considered at once in a row; with as
            many as there are inputs, and one swap, it is the best of all pairs.

    Returns:
        A mask with the counts of `mask` in every row or group, and no larger error.

    Raises:
        PatternError: the pattern keeps blocks whole, or cannot hold this sparsity or shape.
        NumericalError: a weight or a calibration input is infinite or not a number.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns import parse_pattern
        >>> from secateur.sparsity.refinements.swaps import swaps
        >>> weight, mask = torch.tensor([[1.0, 1.0, -1.1]]), torch.tensor([[False, False, True]])
        >>> gram = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.9], [0.9, 0.9, 1.0]])
        >>> pattern = parse_pattern("unstructured")
        >>> swaps(weight, mask, {"gram": gram}, pattern, 2 / 3)
        tensor([[ True, False, False]])
    """
    rows, inputs = weight.shape
    group = _swap_width(pattern, (rows, inputs), sparsity)
    gram = statistics["gram"]
    check_finite(gram.diagonal())
    check_weight(weight)
    chunk_rows = min(_CHUNK_ROWS, max(1, _CHUNK_ENTRIES // (inputs * (group or 1))))
    refined = torch.empty_like(mask, memory_format=torch.contiguous_format)
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        row_weight = weight[chunk].detach().float()
        kept = _swapped(row_weight, mask[chunk], gram, group, swaps, candidates)
        # Swaps are chosen in float32; float64 has the last word on each row.
        worse = _error_change(row_weight, mask[chunk], kept, gram) > 0
        refined[chunk] = torch.where(worse[:, None], mask[chunk], kept)
    return refined


def _swapped(
    weight: Tensor, mask: Tensor, gram: Gram, group: int | None, swaps: int, candidates: int
) -> Tensor:
    """Sweep over the rows that still have a swap, until none has; the mask that results."""
    kept = mask.clone()
    left = torch.full((len(weight),), swaps, device=weight.device)  # swaps that a row may still do
    removed = weight.masked_fill(mask, 0.0)  # d
    # dᵀGd of each row; rounding may make it slightly negative.
    least_gain = _LEAST_GAIN * ((removed @ gram) * removed).sum(1).clamp_(min=0.0)
    active = torch.arange(len(weight), device=weight.device)
    while len(active):
        row_weight, row_kept = weight[active], kept[active]
        costs = _costs(row_weight, row_kept, gram)
        if group is None:
            pairs = _pairs_of_row(row_weight, *costs, gram, candidates)
        else:
            pairs = _pairs_of_groups(row_weight, *costs, gram, group, candidates)
        taken = _take(row_weight, pairs, gram, left[active], least_gain[active])
        # A restored weight may be named by several pairs, of which one is taken: so add, not set.
        flips = torch.zeros_like(row_kept, dtype=torch.int8)
        for columns in (pairs.pruned, pairs.restored):
            flips.scatter_add_(1, columns, taken.to(torch.int8))
        kept[active] = row_kept ^ flips.bool()
        made = taken.sum(1)
        left[active] -= made
        active = active[(made > 0) & (left[active] > 0)]
    return kept


class _Pairs(NamedTuple):
    """Swaps to choose from, each [rows, pairs]; in a row no weight to prune occurs twice."""

    pruned: Tensor
    """The column of the kept weight p."""
    restored: Tensor
    """The column of the pruned weight q."""
    change: Tensor
    """Δ_pq; infinite where there is no such pair."""


def _swap_width(pattern: Pattern, shape: tuple[int, int], sparsity: float) -> int | None:
    """The M within which weights may be swapped, or None for a whole row."""
    pattern.check(shape, sparsity)
    if pattern.scope == "group":
        return pattern.columns_together
    # A unit is a single weight if there are as many units as weights.
    if pattern.units(torch.empty(shape, device="meta")).shape != shape:
        raise PatternError(
            f"single weights of {pattern.name} cannot be swapped: its blocks are kept whole",
            remedy="use swaps with the pattern 'unstructured' or N:M, or leave them out",
        )
    return None


def _costs(weight: Tensor, kept: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
    """The cost of pruning each kept weight, and of restoring each pruned one; else infinite."""
    linear = weight.masked_fill(kept, 0.0) @ gram  # c = dG, [rows, in]
    linear *= 2 * weight
    # w² G_jj for every weight; a kept one adds 2 w c to it, a pruned one takes it away.
    square = weight.square() * gram.diagonal()
    return (
        (square + linear).masked_fill_(~kept, _NEVER),
        (square - linear).masked_fill_(kept, _NEVER),
    )


def _pairs_of_row(
    weight: Tensor, prune_cost: Tensor, restore_cost: Tensor, gram: Gram, candidates: int
) -> _Pairs:
    """The weights that are cheapest to prune, each with the best partner to restore."""
    count = min(candidates, weight.shape[1])
    # The cross term −2 w_p w_q G_pq is left out of this choice; the pairs below have it.
    prune_cost, pruned = prune_cost.topk(count, largest=False)
    restore_cost, restored = restore_cost.topk(count, largest=False)
    # Δ of every prunable p with every restorable q, [rows, count, count].
    change = gram[pruned[:, :, None], restored[:, None, :]]
    change *= (-2 * weight.gather(1, pruned))[:, :, None]
    change *= weight.gather(1, restored)[:, None, :]
    change += prune_cost[:, :, None]
    change += restore_cost[:, None, :]
    best, partner = change.min(2)  # one pair for each p, so no weight is pruned twice
    return _Pairs(pruned, restored.gather(1, partner), best)


def _pairs_of_groups(
    weight: Tensor,
    prune_cost: Tensor,
    restore_cost: Tensor,
    gram: Gram,
    group: int,
    candidates: int,
) -> _Pairs:
    """The best pair of each N:M group, of the groups where it gains most."""
    rows, inputs = weight.shape
    groups = inputs // group
    # G within each group, [groups, M, M]: no pair lies across groups.
    blocks = gram.reshape(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # Δ of all M x M pairs of every group, [rows, groups, M, M]; impossible ones are infinite.
    of_groups = weight.view(rows, groups, group)
    change = (-2 * of_groups)[..., :, None] * of_groups[..., None, :]
    change *= blocks
    change += prune_cost.view(rows, groups, group, 1)
    change += restore_cost.view(rows, groups, 1, group)
    best, place = change.flatten(2).min(2)  # place = p · M + q within the group
    # One pair of a group at most, so no weight is in two pairs.
    best, chosen = best.topk(min(candidates, groups), largest=False)
    place = place.gather(1, chosen)
    first = chosen * group
    return _Pairs(first + place // group, first + place % group, best)


def _take(weight: Tensor, pairs: _Pairs, gram: Gram, left: Tensor, least_gain: Tensor) -> Tensor:
    """Which pairs to swap, bool [rows, pairs]: the best first, the others corrected each time."""
    rows, count = pairs.change.shape
    change, left = pairs.change.clone(), left.clone()
    together = _changes_together(weight, pairs, gram)
    taken = torch.zeros_like(change, dtype=torch.bool)
    every = torch.arange(rows, device=weight.device)
    for _ in range(count):
        # One pair for each row in every turn, all rows together.
        best, index = change.min(1)
        accepted = (best < -least_gain) & (left > 0)
        if not accepted.any():
            break
        # Rows without a swap left take part with their best pair, and `accepted` keeps it out.
        taken[every, index] |= accepted
        left -= accepted.long()
        # Every other pair t now costs Δ_t + 2 δ_sᵀGδ_t.
        change += together[every, index] * accepted[:, None]
        # The pair itself is gone, and so are the others that would restore the same weight.
        same = pairs.restored == pairs.restored.gather(1, index[:, None])
        change.masked_fill_(same & accepted[:, None], _NEVER)
    return taken


def _changes_together(weight: Tensor, pairs: _Pairs, gram: Gram) -> Tensor:
    """2 δ_sᵀGδ_t of all pairs s, t: what they change together beyond Δ_s + Δ_t."""
    rows, count = pairs.change.shape
    # δ_s has two entries, w_p at p and −w_q at q; so δ_sᵀGδ_t is a sum of four entries of G.
    columns = torch.cat([pairs.pruned, pairs.restored], 1)
    signed = weight.gather(1, columns)
    signed[:, count:].neg_()
    products = gram[columns[:, :, None], columns[:, None, :]]
    products *= (2 * signed)[:, :, None]
    products *= signed[:, None, :]
    # [rows, 2, count, 2, count]: summed over p or q of s, and p or q of t.
    return products.view(rows, 2, count, 2, count).sum((1, 3))


def _error_change(weight: Tensor, before: Tensor, after: Tensor, gram: Gram) -> Tensor:
    """By how much dᵀGd of each row changes, float64 [rows].

    (d' − d)ᵀG(d' + d) has no large numbers to subtract, as the two errors would be.
    """
    old = weight.double().masked_fill_(before, 0.0)
    new = weight.double().masked_fill_(after, 0.0)
    difference, total = new - old, new + old
    change = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for start in range(0, len(gram), _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        change += ((difference @ gram[:, columns].double()) * total[:, columns]).sum(1)
    return change
