"""Corrects the search where the winner decodes more slowly than the table of times predicts.

Seconds of a token are predicted as a sum over matrices, each timed in a loop of equal ones. A whole
model can be up to 30 % slower. So the packed winner is timed beside dense int8. If it misses the
speed-up, the search runs once more with a bound that is tighter by the same factor:

    seconds' = seconds · measured speed-up / predicted speed-up

What was measured is kept, so a resumed run goes the same way.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from secateur.reporting.results.fit import FitCorrection
from secateur.runs.atomic import write_json
from secateur.workflows.fit.costs import SECONDS, Costs
from secateur.workflows.fit.finalists import Finalist
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.verify import TIMING_ERROR, speedup_of

__all__ = ["MOST", "corrected"]

MOST = 2
"""Number of searches after the first one, at most."""


def corrected(
    ground: Ground, costs: Costs, winner: Finalist, made: Path, number: int
) -> tuple[Costs, FitCorrection] | None:
    """Bounds that make up for what the table of times promised and the winner does not keep.

    Args:
        ground: of the fit.
        costs: the bounds of the last search.
        winner: of that search.
        made: its packed folder.
        number: of the correction, from 0.

    Returns:
        The bounds of the next search, and why; None if the speed-up is kept or not bounded, if it
        cannot be measured, or if nothing faster is possible.
    """
    wanted, place = ground.recipe.decode_speedup, costs.place(SECONDS)
    if wanted is None or place is None:
        return None
    measured = kept_speedup(ground, made, number)
    if measured is None or measured >= wanted * (1 - TIMING_ERROR):
        return None
    seconds = costs.kinds[place]
    predicted = predicted_speedup(costs, winner) if not winner.cut else wanted
    assert costs.times is not None
    limit = min(seconds.limit, costs.times.base / wanted * measured / predicted)
    least = costs.least(place)
    if least is None or least > seconds.limit * (1 - TIMING_ERROR / 5):
        return None  # the last search had no room either
    limit = max(limit, least)
    kinds = [*costs.kinds]
    kinds[place] = replace(seconds, limit=limit)
    told = FitCorrection(predicted, measured, costs.times.base / limit)
    return replace(costs, kinds=tuple(kinds)), told


def kept_speedup(ground: Ground, made: Path, number: int) -> float | None:
    """The measured speed-up, from the file of an earlier run or timed now."""
    file = ground.work / f"speedup-{number}.json"
    if not file.exists():
        write_json(file, {"speedup": speedup_of(ground, made)})
    found: float | None = json.loads(file.read_text(encoding="utf-8"))["speedup"]
    return found


def predicted_speedup(costs: Costs, winner: Finalist) -> float:
    """What the table of times says of a winner that is not cut."""
    assert costs.times is not None
    linears = sum(costs.seconds(costs.shapes[name], kind) for name, kind in winner.kinds.items())
    return costs.times.base / (costs.times.rest + linears)
