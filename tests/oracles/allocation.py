"""Allocations, one number at a time, in float64."""

from __future__ import annotations

import math

from torch import Tensor


def owl(
    layers: list[list[tuple[Tensor, Tensor]]], sparsity: float, multiple: float, half_range: float
) -> list[float]:
    """The sparsity of each layer of (weight, column norm) pairs; all layers of one size."""
    shares = []
    for linears in layers:
        scores = [
            abs(w) * norm
            for weight, norms in linears
            for row in weight.double().tolist()
            for w, norm in zip(row, norms.double().tolist(), strict=True)
        ]
        mean = sum(scores) / len(scores)
        shares.append(sum(score > multiple * mean for score in scores) / len(scores))
    low, high = min(shares), max(shares)
    r = [(d - low) / (high - low) * 2 * half_range for d in shares]
    return [sparsity - (x - sum(r) / len(r)) for x in r]


def sensitivity(errors: list[float], sparsity: float, half_range: float) -> list[float]:
    """The sparsity of each linear by its rank; errors all different."""
    last = len(errors) - 1
    return [
        sparsity + half_range * (1 - 2 * sum(other < error for other in errors) / last)
        for error in errors
    ]


def equal_slopes(
    divergences: list[float], sizes: list[int], sparsity: float, growth: float, reach: float
) -> list[int]:
    """Prune one weight after the other where the sum of divergences then grows least."""
    counts = [math.ceil((sparsity - reach) * size - 1e-9) for size in sizes]
    most = [math.floor((sparsity + reach) * size + 1e-9) for size in sizes]

    def rise(i: int) -> float:
        before, after = (
            divergences[i] * math.exp(growth * (count / sizes[i] - sparsity))
            for count in (counts[i], counts[i] + 1)
        )
        return after - before

    while sum(counts) < round(sparsity * sum(sizes)):
        free = [i for i in range(len(sizes)) if counts[i] < most[i]]
        counts[min(free, key=rise)] += 1
    return counts


def bounded_threshold(
    tensors: dict[str, Tensor], pruned: int, bounds: dict[str, tuple[int, int]]
) -> dict[str, int]:
    """Prune one score after the other, in order; floors first, and never above a cap."""
    entries = sorted(
        (value, order, index, name)
        for order, (name, tensor) in enumerate(tensors.items())
        for index, value in enumerate(tensor.flatten().tolist())
    )
    counts = {name: low for name, (low, _) in bounds.items()}
    passed = dict.fromkeys(tensors, 0)
    for *_, name in entries:
        passed[name] += 1
        below_floor = passed[name] <= bounds[name][0]
        if below_floor or counts[name] == bounds[name][1] or sum(counts.values()) == pruned:
            continue
        counts[name] += 1
    return counts


def divergence(dense: Tensor, other: Tensor) -> float:
    """Mean over tokens of Σ p · (log p − log q) for logits [tokens, vocabulary]."""
    total = 0.0
    for one, two in zip(dense.double().tolist(), other.double().tolist(), strict=True):
        log_sums = [math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
                    for row in (one, two)]  # fmt: skip
        for a, b in zip(one, two, strict=True):
            log_p, log_q = a - log_sums[0], b - log_sums[1]
            total += math.exp(log_p) * (log_p - log_q)
    return total / len(dense)


def relative_error(weight: Tensor, new: Tensor, inputs: Tensor) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖² from the inputs themselves, [tokens, in]."""
    whole = inputs.double() @ weight.double().t()
    change = inputs.double() @ (weight - new).double().t()
    return float(change.square().sum() / whole.square().sum())
