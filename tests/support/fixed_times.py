"""Times that are the same on every machine, in place of those that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from secateur.evaluation.token_times import BASE, MatrixTimes
from secateur.runs.measured import Drawing
from secateur.runtime.formats import WeightFormat
from secateur.steps import draft as drafts
from secateur.steps.draft import Times
from secateur.steps.fitting import problem

PARENT = tuple(1.0 + 0.02 * n for n in range(8))
"""c(1), c(2), …"""

SECOND = 1e-6
"""Of a byte."""


def matrix_times(
    config: Any, shapes: Sequence[tuple[int, int]], formats: Sequence[WeightFormat], progress: Any
) -> MatrixTimes:
    """The bytes of a matrix, and a little more with a bitmask."""
    every, whole = {BASE, *formats}, sum(map(math.prod, shapes))
    layers = {x: SECOND * whole * x.bits / 8 * (1.1 if x.sparsity else 1.0) for x in every}
    shares = {(s, x): math.prod(s) / whole for s in set(shapes) for x in every}
    return MatrixTimes(layers, shares, SECOND * 96 * 64)


def head_time(shape: tuple[int, int], stored: WeightFormat) -> float:
    """The bytes of a head."""
    return SECOND * math.prod(shape) * stored.bits / 8


def drawing_time(temperature: float, vocabulary: int, rows: int | None = None) -> Drawing:
    """The tokens that a draft and its parent are drawn from; nothing in greedy decoding."""
    return Drawing(1e-5 * temperature * (rows or vocabulary), 1e-5 * temperature * vocabulary)


def use_fixed_times(draft: float = 0.3, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Use these times, and so many seconds for one token of any draft.

    Args:
        draft: seconds.
        replace: sets a name of a module; that of a `MonkeyPatch` undoes it.
    """

    def calls(parent: Any, own: Any, prompt: Tensor) -> Times:
        return PARENT, draft

    replace(problem, "time_matrices", matrix_times)
    for module in (problem, drafts):
        replace(module, "time_head", head_time)
    replace(drafts, "time_calls", calls)
    replace(drafts, "time_turns", lambda verify, own: (PARENT, [draft] * len(own)))
    replace(drafts, "time_drawing", drawing_time)
