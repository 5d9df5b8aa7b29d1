"""A report over runs, sweeps, fits and drafts: the page, charts as files, the model card.

The page is one HTML file that contains everything it shows: what the verbs printed, charts, and one
table of all runs. All text from files and models is escaped, and the page blocks the network and
every script.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from secateur.errors import DISTRIBUTION, RecipeError
from secateur.evaluation.perplexity import judged_part
from secateur.progress import Progress
from secateur.recipes.measure import ReportRecipe
from secateur.report_page.records import ReportedRun, read_places
from secateur.reporting import charts
from secateur.reporting.cards import with_measurements
from secateur.reporting.evaluate import fastest_other
from secateur.reporting.fields import Result, filled
from secateur.reporting.sweep import CurvePoint, curve_charts
from secateur.reporting.tables import Line, Table, bare_name, binary_size, html
from secateur.runs.output import check_writable
from secateur.runs.records import LinearRecord

TEMPLATES = Path(__file__).parent / "templates"


def report(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    plots: bool = False,
    card: str | Path | None = None,
) -> ReportResult:
    """Write one page with all measurements of pruned models, side by side.

    Args:
        runs: run folders, compressed or not; folders of sweeps, fits and drafts.
        output: the HTML file.
        plots: also write every chart as PNG and SVG into the folder `<output>-plots`.
        card: also write the model card of the only run, with all its measurements, to this file;
            with `plots` it shows the charts.

    Raises:
        SecateurError: a place is none of these, a file in it is damaged, or `card` is given
            without exactly one run.
    """
    page = Path(output)
    for file in (page, *([] if card is None else [Path(card)])):
        check_writable(file, file=True)
    places = read_places([Path(run) for run in runs])
    found = [place for place in places if place.sweep is None]
    if card is not None and len(found) != 1:
        raise RecipeError(
            f"a model card is about one run; {len(found)} are named",
            remedy="name one run folder, or leave --card out",
        )
    drawn = _write_page(places, page)
    written: list[Path] = []
    if plots:
        folder = page.with_name(f"{page.stem}-plots")
        folder.mkdir(parents=True, exist_ok=True)
        for chart in drawn:
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in chart.key)
            written += charts.save_plots([chart], folder / name)
    if card is None:
        return ReportResult(page=page, plots=written)
    [run], card = found, Path(card)
    shown = zip(drawn, (file for file in written if file.suffix == ".svg"), strict=False)
    pictures = [
        Line(f"![{chart.title}](<{Path(os.path.relpath(file, card.parent)).as_posix()}>)")
        for chart, file in shown
    ]
    text = with_measurements(run.card, {**run.measured(), "Charts": pictures})
    card.write_text(text, encoding="utf-8", newline="\n")
    return ReportResult(page=page, plots=written, card=card)


def report_recipe(recipe: ReportRecipe, progress: Progress) -> ReportResult:
    """Carry out a recipe."""
    return report(**dict(recipe))


def _write_page(places: Sequence[ReportedRun], page: Path) -> list[charts.Chart]:
    """Write the page about some places; returns its charts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    shared = [*shared_charts(places)]
    own = {place.name: [*own_charts(place)] for place in places}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [*dict.fromkeys(place.source for place in places)]
    text = environment.get_template("page.html.jinja").render(
        title=", ".join(names[:3]) + " and others" * (len(names) > 3),
        places=places,
        compared=comparison([place for place in places if place.sweep is None]),
        shared=shared,
        own=own,
        html=lambda blocks: Markup(html(blocks)),
        svg=lambda chart: Markup(charts.page_svg(chart)),
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        version=version(DISTRIBUTION),
        date=datetime.date.today().isoformat(),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8", newline="\n")
    return [*shared, *(chart for charts in own.values() for chart in charts)]


def comparison(runs: Sequence[ReportedRun]) -> Table:
    """A row for each measure, a column for the dense model and for each run.

    Numbers share a row only if the same was judged beside the same dense model.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        for texts, record, more in _compared(run):
            measure, dense, value = (filled(text, record, **more) for text in texts)
            if measure is not None and value is not None:
                rows.setdefault((measure, dense or ""), {})[run.name] = value
    names = [run.name for run in runs]
    cells = [(*key, *(own.get(name, "") for name in names)) for key, own in rows.items()]
    return Table.of("", ("", "dense", *names), cells)


SIZE = ("weight files; dense in bfloat16", "{dense_bytes:size}", "{file_bytes:size}")
ZEROS = ("zeros in the decoder's matrices", "", "{manifest.result.decoder_sparsity:percent}")
CUT = ("cut out of the decoder", "", "{manifest.structure.decoder_removed:percent}")
LOSS = ("loss above the dense model, nats per token", "0", "{fit.loss}")
SPEED = ("tokens per second, beside {best[0]}", "{best[1]:.0f}", "{rates[packed]:.0f}")
PERPLEXITY = (
    "perplexity, {text:short} ({judged})",
    "{reference_perplexity:.2f}",
    "{perplexity:.2f}< ± {error:.2f}>< (of {inherited_from:short})>",
)
TASK = (
    "{task}, {metric} ({judged})",
    "{reference_value:.3f}",
    "{value:.3f}< ± {standard_error:.3f}>< {mark}>< (of {inherited_from:short})>",
)
"""The rows of the comparison: measure, the dense model's value, and that of a run. Numbers with
another id of what was judged cannot be compared; a number may be that of equal weights."""


def _compared(run: ReportedRun) -> Iterator[tuple[tuple[str, str, str], Any, dict[str, Any]]]:
    """The rows of a run: their texts, the record, and what it does not have."""
    timed = run.bench.contenders if run.bench else ()
    rates = {x.contender: x.tokens_per_second for x in timed if x.tokens_per_second}
    for texts in (SIZE, ZEROS, CUT, LOSS, SPEED):
        yield texts, run, {"rates": rates, "best": fastest_other(rates)}
    for one in run.evaluation.perplexity if run.evaluation else ():
        # of the perplexity: that of the loss times its slope
        error = one.standard_error and one.perplexity * one.standard_error
        yield PERPLEXITY, one, {"judged": judged_part(one.protocol_id), "error": error}
    for score in run.evaluation.tasks if run.evaluation else ():
        mark = "*" if score.significant else None
        yield TASK, score, {"judged": judged_part(score.protocol_id), "mark": mark}


class ReportResult(Result):
    """The written files.

    Attributes:
        page: the report.
        plots: its charts, two files each.
        card: the model card.
    """

    page: Path
    plots: list[Path] = Field(default_factory=list)
    card: Path | None = None

    @property
    def number(self) -> int | None:
        """How many files of charts there are; None without any."""
        return len(self.plots) or None


# -- charts --------------------------------------------------------------------------------------

ALIKE = 0.005
"""Sparsities that differ by at most this count as equal."""


def shared_charts(runs: Sequence[ReportedRun]) -> Iterator[charts.Chart]:
    """The charts with more than one model: perplexity, drift and size."""
    sweeps = [(run.name, run.sweep) for run in runs if run.sweep]
    points = [
        point
        for name, sweep in sweeps
        for point in sweep.curve_points(name if len(sweeps) > 1 else "")
    ]
    yield from curve_charts([*points, *(point for run in runs for point in _points_of(run))])
    yield from _drift(runs)
    yield from _sizes(runs)


def own_charts(run: ReportedRun) -> Iterator[charts.Chart]:
    """The charts of one run: its frontier, its matrices, its speed and memory."""
    if run.fit is not None:
        yield replace(run.fit.chart(), key=f"frontier-{run.name}")
    yield from _heat_maps(run)
    timed = [one for one in run.bench.contenders if one.tokens_per_second] if run.bench else []
    if len(timed) < 2:
        return
    speeds = (
        charts.Bar(x.contender, x.tokens_per_second or 0, f"{x.tokens_per_second:.1f}",
            x.contender.startswith("packed"), x.tokens_per_second_least, x.tokens_per_second_most)
        for x in timed
    )  # fmt: skip
    memory = (
        charts.Bar(x.contender, x.resident_bytes, binary_size(x.resident_bytes),
            x.contender.startswith("packed"))
        for x in timed if x.resident_bytes
    )  # fmt: skip
    note = "Longer is better; lines from least to most."
    yield charts.BarChart(f"speed-{run.name}", "Tokens per second", tuple(speeds), note)
    note = "Shorter is better. Of the process with the model, over that of the libraries alone."
    yield charts.BarChart(f"memory-{run.name}", "Memory", tuple(memory), note)


def _points_of(run: ReportedRun) -> Iterator[CurvePoint]:
    """The perplexities of a run as points."""
    if run.manifest is None or run.evaluation is None:
        return
    for found in run.evaluation.perplexity:
        of = found.inherited_from
        yield CurvePoint(
            model=run.manifest.source.name,
            text=found.text,
            protocol=found.protocol,
            series=run.name if of is None else f"{run.name} (measured on {bare_name(of)})",
            sparsity=run.manifest.lost,
            cut=run.manifest.structure is not None,
            perplexity=found.perplexity,
            dense=found.reference_perplexity,
            joined=False,
        )


def _heat_maps(run: ReportedRun) -> Iterator[charts.HeatMap]:
    """The sparsity of each matrix, unless all are equal, and the error of its output."""
    zeros = _cells(run, lambda x: x.zeros / math.prod(x.shape) if math.prod(x.shape) else None)
    found = [value for row in zeros.values() for value in row if value is not None]
    columns = tuple(layer.layer for layer in run.layers)
    if found and max(found) - min(found) > ALIKE:
        yield charts.HeatMap(
            f"sparsity-{run.name}", "Fraction of zeros in each matrix",
            _short_names(zeros), columns, tuple(zeros.values()),
        )  # fmt: skip
    errors = _cells(run, lambda x: x.error if x.error and math.isfinite(x.error) else None)
    if any(value for row in errors.values() for value in row):
        yield charts.HeatMap(
            f"error-{run.name}", "Error of each matrix",
            _short_names(errors), columns, tuple(errors.values()), log=True,
            note="Relative squared error of its output on the calibration data.",
        )  # fmt: skip


Cells = dict[str, tuple[float | None, ...]]


def _cells(run: ReportedRun, value: Callable[[LinearRecord], float | None]) -> Cells:
    """One value of every matrix: by name within its layer, a value for each layer."""
    # `model.layers.3.mlp.up_proj` of layer 3 is `mlp.up_proj`
    layers = [
        {x.name.partition(f".{layer.layer}.")[2] or x.name: value(x) for x in layer.linears}
        for layer in run.layers
    ]
    return {name: tuple(own.get(name) for own in layers) for name in dict.fromkeys(
        name for own in layers for name in own)}  # fmt: skip


def _short_names(cells: Cells) -> tuple[str, ...]:
    """The last parts of the names; the whole name if two would be equal."""
    last = [name.rpartition(".")[2] for name in cells]
    return tuple(x if last.count(x) == 1 else name for x, name in zip(last, cells, strict=True))


def _drift(runs: Sequence[ReportedRun]) -> Iterator[charts.LineChart]:
    """The distance of the hidden states from the dense model's after each layer."""
    # a layer that was not compared has no error
    series = [
        charts.Series(run.name, tuple(
            (state.layer, state.relative_error)
            for state in run.diagnosis.layers if state.relative_error is not None
        ))
        for run in runs if run.diagnosis
    ]  # fmt: skip
    if any(len(one.points) > 1 for one in series):
        yield charts.LineChart(
            key="drift",
            title="Distance from the dense model, layer by layer",
            x_label="layer",
            y_label="relative error of its output",
            series=tuple(one for one in series if one.points),
            note="By secateur diagnose: norm of the difference over the norm of the dense output.",
        )


def _sizes(runs: Sequence[ReportedRun]) -> Iterator[charts.BarChart]:
    """The size of the weight files beside the uncut dense model in bfloat16, int8 and int4."""
    dense: dict[str, int] = {}
    for run in runs:
        sizes = run.compression.dense_file_bytes if run.compression else {}
        found = {"bfloat16": run.dense_bytes, "int8": sizes.get("int8"), "int4": sizes.get("int4")}
        dense |= {f"dense {x}, {binary_size(n)}": n for x, n in found.items() if n}
    # runs of one model share its dense bars; two models of other sizes have their own
    bars = [charts.Bar(name.partition(",")[0], n, binary_size(n)) for name, n in dense.items()]
    own = {run.name: run.file_bytes for run in runs}
    bars += [charts.Bar(name, n, binary_size(n), ours=True) for name, n in own.items() if n]
    if bars:
        note = "Shorter is better. Dense int8 and int4 store the zeros."
        yield charts.BarChart("size", "Size of the weight files", tuple(bars), note)
