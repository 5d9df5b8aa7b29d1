"""Rounding in groups, one weight after the other in float64 (GPTQ, SparseGPT, QuantEase)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles.scores import damped_hessian
from oracles.sparsegpt import select, selection_width

SCALES = torch.tensor(
    [math.ldexp(1 + step / 16, power) for power in range(-20, 6) for step in range(16)],
    dtype=torch.float64,
)
"""All scales of five significant bits."""


def nearest_scale(wanted: float) -> int:
    """The place of the scale that is nearest to the size of a number."""
    return int((SCALES - abs(wanted)).abs().argmin())


def rounded(weight: float, scale: float, bits: int) -> float:
    """The nearest of −2^(bits − 1) … 2^(bits − 1) − 1 times the scale, which has a sign."""
    return scale * max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(weight / scale)))


def best_scale(weights: Tensor, importance: Tensor, bits: int) -> tuple[float, float]:
    """The best scale of either sign, from 1.5 times the one whose largest integer reaches the
    largest weight downwards, and by how much it is better than the next, as a share.
    """
    peak = float(weights.abs().max())
    if peak == 0:
        return 1.0, 1.0
    count = {2: 48, 3: 33, 4: 29}[bits]
    top = nearest_scale(1.5 * peak / (2 ** (bits - 1) - 1))
    tried = SCALES[top - count + 1 : top + 1].flip(0)
    scales = torch.stack([tried, -tried], dim=1).flatten()[:, None]
    grid = scales * (weights / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    errors, order = (importance * (weights - grid) ** 2).sum(1).sort(stable=True)
    best = float(errors[0])  # where nothing is clipped, both signs have the same error
    second = float(errors[errors > best][:1].sum()) or best
    return float(scales[order[0], 0]), (second - best) / max(second, 1e-30)


def sweep(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group: int,
    *,
    mask: Tensor | None = None,
    text: str = "unstructured",
    scope: str | None = "layer",
    sparsity: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded weight, its mask, and how far each row stays from a tie (of two integers, or of
    two scales)."""
    w = weight.double().clone()
    hessian, dead = damped_hessian(gram)
    w[:, dead] = 0.0
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    diagonal = factor.diagonal()
    kept = torch.ones(w.shape, dtype=torch.bool) if mask is None else mask.clone()
    width = selection_width(text, 128)
    scale = [1.0] * len(w)
    clearance = torch.ones(len(w), dtype=torch.float64)
    for i in range(w.shape[1]):
        if mask is None and i % width == 0:
            # what N:M groups later in the same group of scales would choose now counts there
            stop = min(i + (max(width, group) if ":" in text else width), w.shape[1])
            score = w[:, i:stop] ** 2 / diagonal[i:stop] ** 2
            kept[:, i:stop] = select(text, scope, score, i, sparsity)
        if i % group == 0:
            span = slice(i, i + group)
            for row in range(len(w)):
                held = w[row, span] * kept[row, span]
                scale[row], better = best_scale(held, diagonal[span] ** -2, bits)
                clearance[row] = min(float(clearance[row]), better)
        wanted = torch.zeros(len(w), dtype=torch.float64)
        for row in range(len(w)):
            if kept[row, i]:
                wanted[row] = rounded(float(w[row, i]), scale[row], bits)
                steps = float(w[row, i]) / scale[row]
                if -(2 ** (bits - 1)) < steps < 2 ** (bits - 1) - 1:
                    clearance[row] = min(float(clearance[row]), abs(steps % 1 - 0.5))
        error = (w[:, i] - wanted) / diagonal[i]
        w[:, i:] -= error[:, None] * factor[i, i:]
        w[:, i] = wanted
    return w, kept, clearance


def descend(
    x: Tensor,
    target: Tensor,
    scales: Tensor,
    hessian: Tensor,
    kept: Tensor,
    bits: int,
    group: int,
    passes: int,
) -> tuple[Tensor, Tensor]:
    """Rows x [out, in] after coordinate descent, and how far each stays from a tie of integers or
    of scales."""
    x, scales = x.double().clone(), scales.double().clone()
    clearance = torch.ones(len(x), dtype=torch.float64)
    for row in range(len(x)):

        def vertex(direction: Tensor, row: int = row) -> float:
            """How far to go along a direction, for the least error."""
            curvature = float(direction @ hessian @ direction)
            return -float((x[row] - target[row]) @ hessian @ direction) / curvature

        for _ in range(passes):
            for start in range(0, x.shape[1], group):
                s = float(scales[row, start // group])
                codes = torch.zeros(x.shape[1], dtype=torch.float64)
                codes[start : start + group] = x[row, start : start + group] / s
                if codes.any() and s * (s + vertex(codes)) > 0:
                    wanted = s + vertex(codes)
                    s = math.copysign(float(SCALES[nearest_scale(wanted)]), wanted)
                    steps = (math.frexp(wanted)[0] * 32) % 1
                    clearance[row] = min(float(clearance[row]), abs(steps - 0.5))
                scales[row, start // group] = s
                x[row, start : start + group] = s * codes[start : start + group].round()
                for j in range(start, min(start + group, x.shape[1])):
                    if kept[row, j]:
                        axis = torch.zeros(x.shape[1], dtype=torch.float64)
                        axis[j] = 1.0
                        wanted = float(x[row, j]) + vertex(axis)
                        x[row, j] = rounded(wanted, s, bits)
                        if -(2 ** (bits - 1)) < wanted / s < 2 ** (bits - 1) - 1:
                            near = abs(wanted / s % 1 - 0.5)
                            clearance[row] = min(float(clearance[row]), near)
    return x, clearance
