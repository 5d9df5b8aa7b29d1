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
from secateur.quantization.groups import AT_ONCE

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


class Parabola(NamedTuple):
    """What the error of some weights gains where they change by a u − b v: a scale, a minimum.

        a² uHu − 2 a b uHv + b² vHv + 2 a u r − 2 b v r,       r = (x − w) H

    v is 0 where there is no minimum.
    """

    uu: Tensor
    uv: Tensor
    vv: Tensor
    ur: Tensor
    vr: Tensor

    def first(self) -> Tensor:
        """The best a where b is 0."""
        return torch.where(self.uu > 0, -self.ur / self.uu, 0.0)

    def second(self, a: Tensor) -> Tensor:
        """The best b for a given a."""
        return torch.where(self.vv > 0, (self.vr + a * self.uv) / self.vv, 0.0)

    def vertex(self) -> tuple[Tensor, Tensor]:
        """The best a and b."""
        determinant = self.uu * self.vv - self.uv**2
        usable = determinant > 1e-6 * self.uu * self.vv
        both = (self.vr * self.uv - self.ur * self.vv) / determinant
        a = torch.where(usable, both, self.first())
        return a, torch.where(usable, self.second(a), 0.0)

    def change(self, a: Tensor, b: Tensor) -> Tensor:
        """How much the error grows."""
        straight = a * (a * self.uu + 2 * self.ur)
        return straight + b * (b * self.vv - 2 * self.vr - 2 * a * self.uv)


def search(table: BlockType, x: Tensor, h: Tensor) -> Found:
    """The scales and minima of n blocks.

    Args:
        table: their type.
        x: the weights, float32 [n, sub-blocks, weights of one].
        h: their importance, like `x`.
    """
    size = max(1, AT_ONCE // table.block)
    parts = zip(x.split(size), h.split(size), strict=True)
    found = [_Search(table, own, each).found() for own, each in parts]
    return Found(*(torch.cat(each) for each in zip(*found, strict=True)))


class _Search:
    """The weights of n blocks, their importance, and the sums that no code changes."""

    def __init__(self, table: BlockType, x: Tensor, h: Tensor) -> None:
        self.table = table
        self.x, self.h = x, h.clamp_min(1e-20)
        self.sum_hxx = (self.h * x).mul_(x).sum(-1)
        none = torch.zeros_like(self.sum_hxx)
        minima = table.has_minima
        self.sum_h, self.sum_hx = (self.h.sum(-1), (self.h * x).sum(-1)) if minima else (none, none)

    def found(self) -> Found:
        """All three steps."""
        tried = self._integers(*self._alone())
        best, least = tried, torch.full_like(tried.d, torch.inf)
        for number in range(_ROUNDS + 1):
            tried = self._neighbours(tried) if number < _ROUNDS else tried
            curves, errors = self._recoded(tried.scale, tried.minimum)
            error = errors.sum(-1)
            least, best = _where(error < least, (error, tried), (least, best))
            tried = self._numbers(tried, curves)
        return best

    def _recoded(self, scale: Tensor, minimum: Tensor) -> tuple[Parabola, Tensor]:
        """With the nearest codes: the error for any s and m, from weights of 0; and for these."""
        level = self.table.nearest(self.x, scale[..., None], minimum[..., None])
        weighted = self.h * level
        crossed = weighted.sum(-1) if self.table.has_minima else self.sum_h
        squares = (weighted * level).sum(-1)
        curves = Parabola(
            squares, crossed, self.sum_h, -weighted.mul_(self.x).sum(-1), -self.sum_hx
        )
        return curves, self.sum_hxx + curves.change(scale, minimum)

    def _alone(self) -> tuple[Tensor, Parabola]:
        """Step 1: the best real s, and the error around it."""
        least = torch.full_like(self.sum_h, torch.inf)
        best = (least, Parabola(*[least] * 5))
        for trial in self._trials():
            curves, _ = self._recoded(*trial)
            scale, minimum = curves.vertex()
            if self.table.minima[1] > 0:  # d′ and m are not negative
                scale = torch.where(minimum < 0, curves.first(), scale)
                minimum = minimum.clamp_min(0.0)
            error = curves.change(scale, minimum)
            better = error < least
            least = torch.where(better, error, least)
            best = _where(better, (scale, curves), best)
        return best

    def _trials(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and minima [n, S] for step 1."""
        low, high = self.x.amin(-1), self.x.amax(-1)
        first, last = self.table.ends
        if self.table.has_minima:
            if self.table.minima[1] > 0:
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

    def _integers(self, scale: Tensor, curves: Parabola) -> Found:
        """Step 2."""
        if not self.table.has_integers:
            d, d_min = (_halved(x[:, 0]) for x in (scale, -curves.second(scale)))
            one = torch.ones_like(scale)
            return Found(d, one, d_min, one * self.table.minima[0])
        curvature = curves.uu
        if self.table.has_minima:  # m follows s
            curvature = (curves.uu - curves.uv**2 / curves.vv).clamp_min(0)
        d, scales = _shared(scale, curvature, *self.table.scales)
        wanted = curves.second(d[:, None] * scales).clamp_min(0)
        if not self.table.has_minima:
            return Found(d, scales, torch.zeros_like(d), wanted)
        return Found(d, scales, *_shared(wanted, curves.vv, *self.table.minima))

    def _neighbours(self, at: Found) -> Found:
        """The best of the integers near those of each sub-block, with new codes."""
        if not self.table.has_integers:
            return at
        moves = (0, -1, 1)
        _, least = self._recoded(at.scale, at.minimum)
        scales, minima = at.scales, at.minima
        for a, b in itertools.product(moves, moves if self.table.has_minima else (0,)):
            if a == b == 0:
                continue
            s = (at.scales + a).clamp(*self.table.scales)
            m = (at.minima + b).clamp(*self.table.minima)
            _, error = self._recoded(at.d[:, None] * s, at.d_min[:, None] * m)
            better = error < least
            least, scales, minima = _where(better, (error, s, m), (least, scales, minima))
        return Found(at.d, scales, at.d_min, minima)

    @staticmethod
    def _numbers(at: Found, curves: Parabola) -> Found:
        """Fit d and d′ by least squares with these integers and codes."""
        s, m = at.scales, at.minima
        weights = (s * s, s * m, m * m, s, m)
        whole = (w * part for w, part in zip(weights, curves, strict=True))
        d, d_min = Parabola(*(part.sum(-1) for part in whole)).vertex()
        return at._replace(d=_halved(d), d_min=_halved(d_min))


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
    """Tensors of `new` where the condition holds, else of `old`; tuples of tensors too. A tensor
    with one dimension more has a row for each condition.
    """
    if isinstance(new, Tensor):
        return torch.where(
            condition if new.dim() == condition.dim() else condition[:, None], new, old
        )
    chosen = [_where(condition, n, o) for n, o in zip(new, old, strict=True)]
    return type(new)(*chosen) if hasattr(new, "_fields") else tuple(chosen)
