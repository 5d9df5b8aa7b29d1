"""A report over runs, sweeps, fits and advice: the page, charts as files, the model card."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from secateur.advisor.advise import AdviseResult
from secateur.errors import DISTRIBUTION, RecipeError
from secateur.progress import Progress
from secateur.recipes.measure import ReportRecipe
from secateur.report_page.claims import evidence
from secateur.report_page.figures import all_figures
from secateur.report_page.page import ReportResult, render
from secateur.report_page.records import Records, Reported, ReportedRun, read_records
from secateur.reporting.cards import prune_card, with_dense_card
from secateur.reporting.charts import save_plots
from secateur.runs.output import check_writable


def report(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    plots: bool = False,
    card: str | Path | None = None,
) -> ReportResult:
    """Write one page with all measurements of pruned models, side by side.

    Args:
        runs: run folders, compressed or not; folders of sweeps and fits; JSON files of advice.
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
    records = read_records([Path(run) for run in runs])
    if card is not None and len(records.runs) != 1:
        raise RecipeError(
            f"a model card is about one run; {len(records.runs)} are named",
            remedy="name one run folder, or leave --card out",
        )
    write_page(records, page)
    written = _save_all_plots(records, page.with_name(f"{page.stem}-plots")) if plots else []
    if card is not None:
        pictures = _pictures(records, written, Path(card).parent)
        Path(card).write_text(_card_text(records.runs[0], pictures), encoding="utf-8")
    return ReportResult(page, written, Path(card) if card is not None else None)


def report_recipe(recipe: ReportRecipe, progress: Progress) -> ReportResult:
    """Carry out a recipe."""
    return report(**dict(recipe))


def write_advice(name: str, advice: AdviseResult, page: Path) -> None:
    """Write the page about an advice."""
    write_page(Records(advices=(Reported(name, page, advice),)), page)


def write_page(records: Records, page: Path) -> None:
    """Write the page about some records."""
    page.parent.mkdir(parents=True, exist_ok=True)
    today = datetime.date.today().isoformat()
    page.write_text(render(records, version=version(DISTRIBUTION), date=today), encoding="utf-8")


def _save_all_plots(records: Records, folder: Path) -> list[Path]:
    """Write every chart of the page as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in all_figures(records):
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in chart.key)
        files += save_plots([chart], folder / name)
    return files


def _pictures(records: Records, written: Sequence[Path], folder: Path) -> str:
    """The section of a card in a folder that shows the written charts; empty without any."""
    files = [os.path.relpath(file, folder) for file in written if file.suffix == ".svg"]
    shown = [
        f"![{chart.title}](<{Path(file).as_posix()}>)"
        for chart, file in zip(all_figures(records), files, strict=False)
    ]
    return "\n\n".join(["## Charts", *shown]) if shown else ""


def _card_text(run: ReportedRun, pictures: str) -> str:
    """Write the model card of a run with all its measurements."""
    written = run.folder / "README.md"
    sections = "\n\n".join(filter(None, (evidence(run), pictures)))
    dense = prune_card(run.manifest, run.recipe, run.folder, run.folder, sections)
    if run.compression is None or not written.is_file():
        return dense
    return with_dense_card(written.read_text(encoding="utf-8"), dense)
