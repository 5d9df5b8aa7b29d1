"""What a fit found: the winner, the frontier, and what pruning brought beside rounding alone."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.reporting.drawing import Drawing, draw
from secateur.reporting.report.headline import Claim
from secateur.reporting.report.records import ReportedFit
from secateur.reporting.results.fit import ONLY_ROUNDED, WINNER, FitResult
from secateur.reporting.tables import Table
from secateur.reporting.wording import binary_size, duration, percent, signed

BOUNDS = {
    "max_size": "at most {}",
    "max_inference_memory": "at most {} of memory",
    "max_loss_increase": "loss at most {} higher",
    "decode_speedup": "at least {} times as fast as dense int8",
    "min_accuracy_kept": "at least {} of the accuracy",
}
"""Bounds in words."""

LEAST_GAIN = 0.005
"""A difference in nats per token that is no more than this counts as none."""


@dataclass(frozen=True)
class FitView:
    """The data of a fit for the page.

    Attributes:
        name: of the folder.
        made: a line about the bounds and the work.
        claims: size, loss, and what pruning brought.
        chart: the frontier, drawn.
        tables: as the terminal shows them.
        broken: bounds that the result does not keep.
    """

    name: str
    made: str
    claims: list[Claim]
    chart: Drawing
    tables: list[Table]
    broken: list[str]


def fit_view(fit: ReportedFit) -> FitView:
    """The data of a fit for the page."""
    result = fit.result
    tables = [block for block in result.blocks() if isinstance(block, Table)]
    return FitView(
        fit.name, made_by(result), claims(result), draw(result.chart()), tables, result.broken
    )


def made_by(result: FitResult) -> str:
    """The bounds, how many candidates were measured, and how long it took."""
    bounds = [BOUNDS[one.option].format(one.in_words(one.wanted)) for one in result.checks]
    measured = len(result.singles) + len(result.frontier)
    made = len(result.finalists)
    return (
        f"fit: {', '.join(bounds) or 'no bound'}; {measured} candidates on the frontier, {made} "
        f"finalists; {duration(result.seconds)}"
    )


def claims(result: FitResult) -> list[Claim]:
    """Size, loss, and what pruning brought."""
    packed, loss = result.packed, result.losses[WINNER].loss_increase
    return [
        Claim(
            "Smaller by",
            percent(1 - packed.ratio),
            f"{binary_size(packed.file_bytes)} instead of {binary_size(packed.bfloat16_bytes)} in "
            "dense bfloat16.",
            tone="good" if packed.ratio < 1 else "bad",
        ),
        Claim(
            "Loss",
            signed(loss, 3),
            "nats per token above the dense model, on text that neither made nor chose it.",
            tone="good" if loss < 0.05 else "fair" if loss < 0.3 else "bad",
        ),
        pruning_brought(result),
    ]


def pruning_brought(result: FitResult) -> Claim:
    """The loss of the winner beside the best rounding alone within the same budget."""
    winner, rounded = result.losses[WINNER], result.losses.get(ONLY_ROUNDED)
    zeros = sum("zeros" in kind for kind in result.kind_of.values())
    used = f"{zeros} of {len(result.kind_of)} matrices of the winner have zeros."
    if rounded is None:
        return Claim(
            "Pruning brought",
            "the size",
            f"No rounding alone fits into this budget. {used}",
            tone="good",
        )
    sizes = (
        f"Rounding alone, at {binary_size(rounded.file_bytes)}: "
        f"{signed(rounded.loss_increase, 3)} nats."
    )
    gain = rounded.loss_increase - winner.loss_increase
    if winner == rounded or abs(gain) <= LEAST_GAIN:
        return Claim("Pruning brought", "nothing", f"{sizes} {used}")
    part = f", {percent(gain / rounded.loss_increase)} of it" if rounded.loss_increase > 0 else ""
    value = f"{signed(-gain, 3)} nats"
    said = (
        f"{sizes} The winner loses {abs(gain):.3f} {'less' if gain > 0 else 'more'}{part}. {used}"
    )
    return Claim("Pruning brought", value, said, tone="good" if gain > 0 else "bad")
