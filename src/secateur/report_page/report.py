"""A report over runs, sweeps, fits and drafts: the page, charts as files, the model card.

The page is one HTML file that contains everything it shows: what the verbs printed, charts, and one
table of all runs. All text from files and models is escaped, and the page blocks the network and
every script.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from secateur.errors import DISTRIBUTION, RecipeError
from secateur.evaluation.perplexity import judged_part
from secateur.progress import Progress
from secateur.recipes.measure import ReportRecipe
from secateur.report_page.figures import own_charts, shared_charts
from secateur.report_page.records import ReportedRun, read_places
from secateur.reporting.cards import with_measurements
from secateur.reporting.charts import Chart, page_svg, save_plots
from secateur.reporting.evaluate import fastest_other
from secateur.reporting.tables import (
    Block,
    Line,
    Result,
    Table,
    bare_name,
    binary_size,
    html,
    percent,
    with_error,
)
from secateur.runs.output import check_writable
from secateur.runs.records.measured import Measurement

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
    charts = _write_page(places, page)
    written: list[Path] = []
    if plots:
        folder = page.with_name(f"{page.stem}-plots")
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in chart.key)
            written += save_plots([chart], folder / name)
    if card is None:
        return ReportResult(page, written)
    [run], card = found, Path(card)
    drawn = zip(charts, (file for file in written if file.suffix == ".svg"), strict=False)
    pictures = [
        Line(f"![{chart.title}](<{Path(os.path.relpath(file, card.parent)).as_posix()}>)")
        for chart, file in drawn
    ]
    text = with_measurements(run.card, {**run.measured(), "Charts": pictures})
    card.write_text(text, encoding="utf-8", newline="\n")
    return ReportResult(page, written, card)


def report_recipe(recipe: ReportRecipe, progress: Progress) -> ReportResult:
    """Carry out a recipe."""
    return report(**dict(recipe))


def _write_page(places: Sequence[ReportedRun], page: Path) -> list[Chart]:
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
        svg=lambda chart: Markup(page_svg(chart)),
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
        for measure, dense, value in _measures(run):
            rows.setdefault((measure, dense), {})[run.name] = value
    names = [run.name for run in runs]
    cells = [(*key, *(own.get(name, "") for name in names)) for key, own in rows.items()]
    return Table.of("", ("", "dense", *names), cells)


def _measures(run: ReportedRun) -> Iterator[tuple[str, str, str]]:
    """What was measured of a run: the measure, the dense model's value, and its own."""
    if run.file_bytes is not None:
        yield "weight files; dense in bfloat16", binary_size(run.dense_bytes or 0), (
            binary_size(run.file_bytes))  # fmt: skip
    if run.manifest is not None:
        yield "zeros in the decoder's matrices", "", percent(run.manifest.result.decoder_sparsity)
        if run.manifest.structure is not None:
            yield "cut out of the decoder", "", percent(run.manifest.structure.decoder_removed)
    if run.fit is not None:
        yield "loss above the dense model, nats per token", "0", str(run.fit.loss)
    timed = run.bench.contenders if run.bench else ()
    rates = {x.contender: x.tokens_per_second for x in timed if x.tokens_per_second}
    if (fastest := fastest_other(rates)) is not None:
        name, rate = fastest
        yield f"tokens per second, beside {name}", f"{rate:.0f}", f"{rates['packed']:.0f}"
    if run.evaluation is None:
        return
    for text in run.evaluation.perplexity:
        error = text.standard_error and text.perplexity * text.standard_error
        dense = "" if text.reference_perplexity is None else f"{text.reference_perplexity:.2f}"
        value = with_error(text.perplexity, error, ".2f")
        yield _name(f"perplexity, {bare_name(text.text)}", text), dense, value + _origin(text)
    for task in run.evaluation.tasks:
        dense = "" if task.reference_value is None else f"{task.reference_value:.3f}"
        mark = " *" if task.significant else ""
        value = with_error(task.value, task.standard_error, ".3f") + mark
        yield _name(f"{task.task}, {task.metric}", task), dense, value + _origin(task)


def _name(measure: str, found: Measurement) -> str:
    """A measure with the id of what was judged; numbers with another id cannot be compared."""
    return f"{measure} ({judged_part(found.protocol_id)})"


def _origin(found: Measurement) -> str:
    """The model that was measured, if it is another one with the same weights."""
    return "" if found.inherited_from is None else f" (of {bare_name(found.inherited_from)})"


@dataclass(frozen=True, repr=False)
class ReportResult(Result):
    """The written files.

    Attributes:
        page: the report.
        plots: its charts, two files each.
        card: the model card.
    """

    page: Path
    plots: list[Path] = field(default_factory=list)
    card: Path | None = None

    def blocks(self) -> Sequence[Block]:
        """A line for each kind of file."""
        lines = [Line(f"report: {self.page}")]
        if self.plots:
            lines.append(Line(f"plots: {len(self.plots)} files in {self.plots[0].parent}"))
        if self.card:
            lines.append(Line(f"model card: {self.card}"))
        return lines
