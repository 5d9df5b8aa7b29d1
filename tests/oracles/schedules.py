"""Schedules, step by step in exact fractions, from the words of the papers."""

from __future__ import annotations

from fractions import Fraction


def one_shot(first: float, last: float, step: int, steps: int) -> float:
    """Everything before the first step."""
    return last


def linear(first: float, last: float, step: int, steps: int) -> float:
    """The same amount added in every step."""
    sparsity, added = Fraction(first), (Fraction(last) - Fraction(first)) / steps
    for _ in range(step):
        sparsity += added
    return float(sparsity)


def cubic(first: float, last: float, step: int, steps: int) -> float:
    """s_t = s_f + (s_i − s_f)(1 − (t − t₀)/(nΔt))³ with t₀ = 1000, Δt = 100."""
    t0, interval, n = 1000, 100, steps
    t = t0 + interval * step
    away = 1 - Fraction(t - t0, n * interval)
    return float(Fraction(last) + (Fraction(first) - Fraction(last)) * away * away * away)


def geometric(first: float, last: float, step: int, steps: int) -> float:
    """Every step prunes the same fraction of what is left; the fraction is found by halving."""
    low, high = 0.0, 1.0
    for _ in range(200):
        fraction = (low + high) / 2
        left = 1 - first
        for _ in range(steps):
            left -= fraction * left
        low, high = (fraction, high) if left > 1 - last else (low, fraction)
    left = 1 - first
    for _ in range(step):
        left -= fraction * left
    return 1 - left
