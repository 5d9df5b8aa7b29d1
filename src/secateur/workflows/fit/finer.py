"""Sparsities between those of the levels, for mixes that are made whole.

A mix that is made can give a linear any sparsity, so no checkpoint is needed for these kinds. What
they cost is arithmetic, and what they lose lies between two levels that were measured:

    pruning(s)     = exp(line through ln rise at 50 % and at 70 %, bfloat16)
    rounding(v, s) = line through the rise of rounding at 0 % and at 50 %; constant above
    rise(v, s)     = pruning(s) + rounding(v, s)
"""

from __future__ import annotations

from math import exp, log

from secateur.engine.choose.budgeted import Menu
from secateur.engine.choose.fitting import FitSearch
from secateur.workflows.fit.bounds import size_of
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import KINDS, LevelKind

LEAST_RISE = 1e-12

HALF, MOST = (KINDS.index(LevelKind("bfloat16", s)) for s in (0.5, 0.7))


def finer_menu(ground: Ground, search: FitSearch) -> Menu:
    """The menu of the levels and, after them, of the finer kinds that the target stores.

    Args:
        ground: of the fit.
        search: after the survey.
    """
    cost, rise = [], []
    for place, name in enumerate(search.names):
        costs, rises = search.menu.cost[place], search.menu.rise[place]
        bytes_of = tuple(level[0] for level in costs)
        shape, finer = ground.costs.shapes[name], ground.costs.files.finer
        sizes = [finer_bytes(kind, shape, bytes_of) for kind in finer]
        more = [ground.costs.of(name, kind, x) for kind, x in zip(finer, sizes, strict=True)]
        cost.append((*costs, *more))
        rise.append((*rises, *(finer_rise(kind, rises) for kind in finer)))
    return Menu(tuple(cost), tuple(rise))


def finer_bytes(kind: LevelKind, shape: tuple[int, int], bytes_of: tuple[float, ...]) -> float:
    """Bytes of a linear: those of its level with 50 % zeros, and the difference by arithmetic."""
    near = LevelKind(kind.values, 0.5)
    return bytes_of[KINDS.index(near)] + size_of(shape, kind) - size_of(shape, near)


def finer_rise(kind: LevelKind, rises: tuple[float, ...]) -> float:
    """What a linear adds to the divergence, in nats."""
    half, most = (log(max(rises[n], LEAST_RISE)) for n in (HALF, MOST))
    pruning = exp(half + (most - half) * (kind.sparsity - 0.5) / 0.2)
    bare = rises[KINDS.index(LevelKind(kind.values, 0.0))]
    sparse = max(rises[KINDS.index(LevelKind(kind.values, 0.5))] - rises[HALF], 0.0)
    return pruning + bare + (sparse - bare) * min(kind.sparsity / 0.5, 1.0)
