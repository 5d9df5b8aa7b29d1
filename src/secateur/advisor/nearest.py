"""Which bounds would have to be looser, when nothing serves a load within them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from secateur.advisor.advice import Considered, Need
from secateur.advisor.capacity import TooMuch
from secateur.advisor.memory import GIB


def nearest(rows: Sequence[Considered], need: Need) -> Iterator[str]:
    """The nearest bounds that can be kept, a sentence for each; each is enough alone.

    Args:
        rows: all options, of which none is chosen.
        need: the load and the bounds.
    """
    served = [row for row in rows if row.cost is not None]
    if served and need.quality_loss is not None:
        best = max(served, key=lambda row: row.kept[0])
        loss = math.ceil(1000 * (1 - best.kept[0])) / 1000
        if loss < 1:
            yield f"{best.option.name} serves it with --quality-loss {loss:g}"
    if served and need.gpu_hours is not None:
        least = min(served, key=lambda row: row.making.gpu_hours.typical)
        hours = math.ceil(least.making.gpu_hours.typical)
        if hours > need.gpu_hours:
            yield f"{least.option.name} takes --gpu-hours {hours}"
    floor = 0.0 if need.quality_loss is None else 1 - need.quality_loss
    for bound, flag, unit in (
        ("token_ms", "--latency-p99-ms", "ms between two tokens"),
        ("first_token_ms", "--first-token-ms", "ms to the first token"),
    ):
        quick = min(misses(rows, bound, floor), default=None)
        if quick is not None:
            least_ms = math.ceil(10 * quick[0]) / 10
            yield f"{quick[1]} has {least_ms:g} {unit}: {flag} {least_ms:g}"
    small = min(misses(rows, "memory", floor), default=None)
    if small is not None and not served:
        yield f"{small[1]} needs the least memory: {small[0] / GIB:.1f} GiB"


def misses(rows: Sequence[Considered], bound: str, floor: float) -> Iterator[tuple[float, str]]:
    """By how much each option breaks one bound, of those that surely keep the accuracy."""
    for row in rows:
        if (
            isinstance(row.capacity, TooMuch)
            and row.kept[0] >= floor
            and row.capacity.bound == bound
        ):
            yield row.capacity.least, row.option.name
