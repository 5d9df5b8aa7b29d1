"""Perplexity against sparsity: which points share a chart, and which form a line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.evaluation.protocol import judged_part, protocol_id
from secateur.reporting.charts import LineChart, Mark, Series
from secateur.reporting.results.sweep import SweepResult
from secateur.reporting.wording import bare_name, percent, signed


@dataclass(frozen=True)
class CurvePoint:
    """One perplexity of one pruned model.

    Attributes:
        model: the dense model, whose tokenizer the perplexity depends on.
        text: the text that the perplexity was measured on.
        protocol: how it was measured.
        series: the line that the point belongs to.
        sparsity: the removed fraction of the decoder: zeros in its matrices, or cut out.
        perplexity: the value.
        dense: perplexity of the dense model, if it was measured.
        joined: whether the points of the series are joined by a line.
        cut: whether units were cut out of the model.
    """

    model: str
    text: str
    protocol: dict[str, Any] = field(compare=False)
    series: str
    sparsity: float
    perplexity: float
    dense: float | None = None
    joined: bool = True
    cut: bool = False

    @property
    def alike(self) -> tuple[Any, ...]:
        """A key that is equal for perplexities that can be compared."""
        return self.model, judged_part(protocol_id("ppl", self.protocol))

    @property
    def told(self) -> str:
        """The point in words."""
        gone = "of the decoder cut out or zero" if self.cut else "zeros"
        words = (
            f"{self.series}: perplexity {self.perplexity:.2f} at {percent(self.sparsity, 2)} {gone}"
        )
        if self.dense:
            words += f", {signed(math.log(self.perplexity / self.dense), 3)} nats a token"
        return words


def judged_points(result: SweepResult, name: str = "") -> list[CurvePoint]:
    """The points of a sweep; `name` distinguishes its lines from those of other sweeps."""
    return [
        CurvePoint(
            model=result.sweep.model,
            text=text,
            protocol=result.sweep.protocol[text],
            series=" ".join(
                filter(None, (name, p.method, "" if p.pattern == "unstructured" else p.pattern))
            ),
            sparsity=p.zeros,
            perplexity=p.perplexity[text],
            dense=result.dense[text],
            joined=":" not in p.pattern,
        )
        for p in result.points
        for text in result.texts
    ]


def sweep_charts(results: Sequence[SweepResult]) -> list[LineChart]:
    """One chart for each text that sweeps were evaluated on."""
    return curve_charts(point for result in results for point in judged_points(result))


def curve_charts(points: Iterable[CurvePoint]) -> list[LineChart]:
    """One chart for each set of comparable perplexities with at least two sparsities."""
    groups: dict[tuple[Any, ...], list[CurvePoint]] = {}
    for point in points:
        if math.isfinite(point.perplexity) and point.perplexity > 0:
            groups.setdefault(point.alike, []).append(point)
    several = [g for g in groups.values() if len({round(p.sparsity, 2) for p in g}) > 1]
    return [chart_of(number, group) for number, group in enumerate(several, start=1)]


def chart_of(number: int, group: Sequence[CurvePoint]) -> LineChart:
    """The chart of a set of comparable perplexities."""
    first = group[0]
    series: dict[str, list[CurvePoint]] = {}
    for point in group:
        series.setdefault(point.series, []).append(point)
    dense = next((point.dense for point in group if point.dense), None)
    protocol = first.protocol
    return LineChart(
        key=f"perplexity-{number}",
        title=f"{bare_name(first.model)}: perplexity on {bare_name(first.text)}",
        x_label="part of the decoder that is zero or cut out"
        if any(point.cut for point in group)
        else "zeros in the decoder's matrices",
        y_label="perplexity (log)",
        series=tuple(
            Series(
                name,
                tuple(Mark(p.sparsity, p.perplexity, short(p.perplexity), p.told) for p in own),
                joined=own[0].joined and len(own) > 1,
            )
            for name, own in series.items()
        ),
        reference=None if dense is None else ("dense", dense),
        log_y=True,
        percent_x=True,
        note=f"{protocol.get('windows', '?')} windows of {protocol.get('sequence_length', '?')} "
        f"tokens of {bare_name(str(protocol.get('dataset', first.text)))}, protocol "
        f"{judged_part(protocol_id('ppl', protocol))}. Lower is better.",
    )


def short(value: float) -> str:
    """A perplexity as a short text."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
