"""Corrects the search where the winner decodes more slowly than the table of times predicts.

Seconds of a token are predicted as a sum over matrices, each timed in a loop of equal ones. A whole
model can be up to 30 % slower. So the packed winner is timed beside dense int8. If it misses the
speed-up, the search runs once more with a bound that is tighter by the same factor:

    seconds' = seconds · measured speed-up / predicted speed-up

The new winner stays only if it is faster by more than the error of timing; it has lost more. What
was measured is kept, so a resumed run goes the same way.
"""

from __future__ import annotations

import json
from pathlib import Path

from secateur.runs.atomic import write_json
from secateur.workflows.fit.costs import SECONDS, Costs
from secateur.workflows.fit.finalists import Finalist
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.verify import TIMING_ERROR, speedup_of

MOST = 2
"""Number of searches after the first one, at most."""


def timed(ground: Ground, made: Path, number: int) -> float | None:
    """The speed-up of a packed winner, from the file of an earlier run or timed now.

    Args:
        ground: of the fit.
        made: its folder.
        number: of the winner, from 0.

    Returns:
        None if it is not bounded, or cannot be measured.
    """
    if ground.recipe.decode_speedup is None:
        return None
    file = ground.work / f"speedup-{number}.json"
    if not file.exists():
        write_json(file, {"speedup": speedup_of(ground, made)})
    found: float | None = json.loads(file.read_text(encoding="utf-8"))["speedup"]
    return found


def misses(ground: Ground, speedup: float) -> bool:
    """Whether a measured speed-up is less than the bound, by more than the error of timing."""
    wanted = ground.recipe.decode_speedup
    return wanted is not None and speedup < wanted * (1 - TIMING_ERROR)


def is_faster(speedup: float | None, before: float) -> bool:
    """Whether a speed-up is more than another one, by more than the error of timing."""
    return speedup is not None and speedup > before * (1 + TIMING_ERROR)


def predicted_speedup(ground: Ground, costs: Costs, winner: Finalist) -> float:
    """The speed-up that the table of times predicts for a winner; the bound for a cut one."""
    assert costs.times is not None
    if winner.cut:
        return float(ground.recipe.decode_speedup or 1.0)
    linears = sum(costs.seconds(costs.shapes[name], kind) for name, kind in winner.kinds.items())
    return costs.times.base / (costs.times.rest + linears)


def tightened(ground: Ground, costs: Costs, ratio: float) -> Costs | None:
    """Bounds that make up for what the table promises too much.

    Args:
        ground: of the fit.
        costs: the bounds of the last search.
        ratio: measured by predicted speed-up of its winner.

    Returns:
        None if the last search had no room left either.
    """
    wanted, place = ground.recipe.decode_speedup, costs.place(SECONDS)
    assert wanted is not None
    assert place is not None
    assert costs.times is not None
    seconds, least = costs.kinds[place], costs.least(place)
    if least is None or least > seconds.limit * (1 - TIMING_ERROR / 5):
        return None
    return costs.limited(place, max(min(seconds.limit, costs.times.base / wanted * ratio), least))
