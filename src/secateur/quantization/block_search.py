"""The scales and minima of blocks with the least error Σ_j h_j (w_j − ŵ_j)².

    1. each sub-block alone: codes of several trial grids; for each the best s and m as real
       numbers, by least squares; the trial with the least error stays
    2. the integers of a block: several d, and for each the nearest integers of all s; then d′ and
       the integers of m, each m moved to make up for the rounding of its s
    3. a few times: for every sub-block all neighbours of its integers, with new codes; then d and
       d′ by least squares, in float16. What raises the error is not taken.

Step 2 knows the error of any s and m of a sub-block while its codes stay: a parabola in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.quantization.block_types import BlockType, inverse

_HALF = 65504.0
"""The largest float16."""

_REACHES = tuple(0.55 + k / 40 for k in range(26))
"""Where the largest weight of a sub-block is tried, in units of the highest or lowest q."""

_ROUNDS = 2
"""Of step 3."""

_SHARED = 32
"""How many d are tried for a block, down to about half of the one that reaches the largest s."""


class Found(NamedTuple):
    """Scales and minima of n blocks with S sub-blocks each; integers are whole float32.

    Attributes:
        d: float32 [n], exact in float16.
        scales: s [n, S].
        d_min: d′, float32 [n], exact in float16; 0 where the type has no minimum.
        minima: m [n, S].
    """

    d: Tensor
    scales: Tensor
    d_min: Tensor
    minima: Tensor

    @property
    def scale(self) -> Tensor:
        """The scale d · s, [n, S]."""
        return self.d[:, None] * self.scales

    @property
    def minimum(self) -> Tensor:
        """The minimum d′ · m, [n, S]."""
        return self.d_min[:, None] * self.minima


class _Sums(NamedTuple):
    """Sums over each sub-block with some codes q, [n, S]: Σ h q, Σ h q², Σ h q x."""

    q: Tensor
    qq: Tensor
    qx: Tensor


def search(table: BlockType, x: Tensor, h: Tensor, near: Found | None = None) -> Found:
    """The scales and minima of n blocks.

    Args:
        table: their type.
        x: the weights, float32 [n, sub-blocks, weights of one].
        h: their importance, like `x`.
        near: begins step 3, in place of steps 1 and 2.
    """
    return _Search(table, x, h).found(near)


class _Search:
    """The weights of n blocks, their importance, and the sums that no code changes."""

    def __init__(self, table: BlockType, x: Tensor, h: Tensor) -> None:
        self.table = table
        self.x, self.h = x, h.clamp_min(1e-20)
        self.sum_h, self.sum_hx = self.h.sum(-1), (self.h * x).sum(-1)
        self.sum_hxx = (self.h * x).mul_(x).sum(-1)

    def found(self, near: Found | None) -> Found:
        """All three steps, or the third."""
        best = self._integers(*self._alone()) if near is None else near
        least = torch.full_like(best.d, torch.inf)
        tried = best
        for _ in range(_ROUNDS):
            tried = self._neighbours(tried)
            sums, error = self._recoded(tried.scale, tried.minimum)
            best, least = _better(best, least, tried, error.sum(-1))
            tried = self._block_scales(tried, sums)
        _, error = self._recoded(tried.scale, tried.minimum)
        best, _ = _better(best, least, tried, error.sum(-1))
        return best

    def _sums(self, level: Tensor) -> _Sums:
        weighted = self.h * level
        return _Sums(weighted.sum(-1), (weighted * level).sum(-1), weighted.mul_(self.x).sum(-1))

    def _error(self, scale: Tensor, minimum: Tensor, sums: _Sums) -> Tensor:
        """Σ h (s q − m − x)² of each sub-block, [n, S]."""
        straight = scale * (scale * sums.qq - 2 * sums.qx)
        return (
            self.sum_hxx
            + straight
            + minimum * (minimum * self.sum_h + 2 * self.sum_hx - 2 * scale * sums.q)
        )

    def _levels(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest q of all weights."""
        position = self.x * inverse(scale)[..., None]
        if self.table.has_minima:
            position += (minimum * inverse(scale))[..., None]
        return self.table.level(position)

    def _recoded(self, scale: Tensor, minimum: Tensor) -> tuple[_Sums, Tensor]:
        """The sums with the nearest codes, and the error."""
        sums = self._sums(self._levels(scale, minimum))
        return sums, self._error(scale, minimum, sums)

    def _fitted(self, sums: _Sums) -> tuple[Tensor, Tensor]:
        """The best real s and m of each sub-block for these codes."""
        scale = sums.qx / sums.qq.clamp_min(1e-30)
        if not self.table.has_minima:
            return scale, torch.zeros_like(scale)
        determinant = self.sum_h * sums.qq - sums.q**2
        usable = determinant > 1e-7 * self.sum_h * sums.qq
        both = (self.sum_h * sums.qx - self.sum_hx * sums.q) / determinant
        minimum = (sums.q * sums.qx - sums.qq * self.sum_hx) / determinant
        if self.table.minima is not None:  # d′ and m are not negative
            usable &= minimum > 0
        flat = torch.where(usable, minimum, 0.0)
        return torch.where(usable, both, scale), flat

    def _alone(self) -> tuple[Tensor, Tensor, _Sums]:
        """Step 1: the best real s and m, and the sums of their codes."""
        least = torch.full_like(self.sum_h, torch.inf)
        best = (least, least, _Sums(least, least, least))
        for scale, minimum in self._trials():
            sums = self._sums(self._levels(scale, minimum))
            fitted = self._fitted(sums)
            error = self._error(*fitted, sums)
            better = error < least
            least = torch.where(better, error, least)
            best = _where(better, (*fitted, sums), best)
        return best

    def _trials(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and minima [n, S] for step 1."""
        low, high = self.x.amin(-1), self.x.amax(-1)
        first, last = self.table.ends
        if self.table.has_minima:
            if self.table.minima is not None:
                low = low.clamp_max(0.0)
            span = high - low
            # Both ends move by half steps: from half a step outwards to one and a half inwards.
            trims = [k / (2 * last) for k in range(-1, 4)]
            for above, below in itertools.product(trims, trims):
                bottom = low + below * span
                yield (high - above * span - bottom) / last, -bottom
            return
        peak = torch.where(high > -low, high, low)
        for reach, end in itertools.product(_REACHES, (first, last)):
            yield peak / (end * reach), torch.zeros_like(peak)

    def _integers(self, scale: Tensor, minimum: Tensor, sums: _Sums) -> Found:
        """Step 2."""
        one = torch.ones_like(scale)
        if self.table.scales is None:
            d, d_min = (_halved(x[:, 0]) for x in (scale, -minimum))
            return Found(d, one, d_min, -one if self.table.has_minima else 0 * one)
        curvature = sums.qq
        if self.table.has_minima:  # m follows s
            curvature = (sums.qq - sums.q**2 / self.sum_h).clamp_min(0)
        d, scales = _shared(scale, curvature, *self.table.scales)
        if not self.table.has_minima:
            return Found(d, scales, torch.zeros_like(d), torch.zeros_like(scale))
        moved = minimum + sums.q / self.sum_h * (d[:, None] * scales - scale)
        d_min, minima = _shared(moved.clamp_min(0), self.sum_h, 0, self.table.minima or 0)
        return Found(d, scales, d_min, minima)

    def _neighbours(self, at: Found) -> Found:
        """The best of the integers near those of each sub-block, with new codes."""
        if self.table.scales is None:
            return at
        moves = (0, -1, 1)
        _, least = self._recoded(at.scale, at.minimum)
        scales, minima = at.scales, at.minima
        for a, b in itertools.product(moves, moves if self.table.has_minima else (0,)):
            if a == b == 0:
                continue
            s = (at.scales + a).clamp(*self.table.scales)
            m = (at.minima + b).clamp(0, self.table.minima or 0)
            _, error = self._recoded(at.d[:, None] * s, at.d_min[:, None] * m)
            better = error < least
            least, scales, minima = _where(better, (error, s, m), (least, scales, minima))
        return Found(at.d, scales, at.d_min, minima)

    def _block_scales(self, at: Found, sums: _Sums) -> Found:
        """Fit d and d′ by least squares with these integers and codes."""
        s, m = at.scales, at.minima
        ss, sx = (s * s * sums.qq).sum(-1), (s * sums.qx).sum(-1)
        d = sx / ss.clamp_min(1e-30)
        if not self.table.has_minima:
            return at._replace(d=_halved(torch.where(ss > 0, d, at.d)))
        sm, mm = (s * m * sums.q).sum(-1), (m * m * self.sum_h).sum(-1)
        mx = (m * self.sum_hx).sum(-1)
        determinant = ss * mm - sm**2
        usable = determinant > 1e-7 * ss * mm
        both = (mm * sx - sm * mx) / determinant
        d_min = (sm * sx - ss * mx) / determinant
        return at._replace(
            d=_halved(torch.where(usable, both, at.d)),
            d_min=_halved(torch.where(usable, d_min, at.d_min)),
        )


def _shared(wanted: Tensor, curvature: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """One float16 d for each row, and integers, with the least Σ c (wanted − d · integer)²."""
    peak = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))  # with its sign
    least = torch.full_like(peak, torch.inf)
    d, integers = torch.zeros_like(peak), torch.zeros_like(wanted)
    ends = (highest, lowest) if lowest else (highest,)
    for end in ends:
        for k in range(_SHARED):
            tried = peak / (end * (1.06 - 0.5 * k / _SHARED))
            whole = (wanted * inverse(tried)).round_().clamp_(lowest, highest)
            covered = (curvature * whole * wanted).sum(1, keepdim=True)
            squares = (curvature * whole * whole).sum(1, keepdim=True)
            fitted = _halved(covered / squares.clamp_min(1e-30))
            whole = (wanted * inverse(fitted)).round_().clamp_(lowest, highest)
            error = (curvature * (wanted - fitted * whole) ** 2).sum(1, keepdim=True)
            better = error < least
            least, d, integers = _where(better, (error, fitted, whole), (least, d, integers))
    return d[:, 0], integers


def _halved(number: Tensor) -> Tensor:
    """The nearest float16 that is finite, as float32."""
    return number.clamp(-_HALF, _HALF).half().float()


def _where(condition: Tensor, new: Any, old: Any) -> Any:
    """Tensors of `new` where the condition holds, else of `old`; tuples of tensors too."""
    if isinstance(new, Tensor):
        return torch.where(condition, new, old)
    chosen = [_where(condition, n, o) for n, o in zip(new, old, strict=True)]
    return type(new)(*chosen) if hasattr(new, "_fields") else tuple(chosen)


def _better(best: Found, least: Tensor, tried: Found, error: Tensor) -> tuple[Found, Tensor]:
    """Of each block the scales with the lower error."""
    better = error < least
    kept = [
        torch.where(better if new.dim() == 1 else better[:, None], new, old)
        for new, old in zip(tried, best, strict=True)
    ]
    return Found(*kept), torch.where(better, error, least)
