"""A report over runs, sweeps, fits, drafts and advice: the page, charts as files, the model card.

The page is one HTML file that contains everything it shows. The templates escape all text from
files and models. The page also blocks the network and every script except its own.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.advisor.advise import AdviseResult
from secateur.diagnostics.findings import SEVERITIES, by_severity
from secateur.errors import DISTRIBUTION, RecipeError
from secateur.evaluation.generation import DEGENERATE
from secateur.progress import Progress
from secateur.recipes.measure import ReportRecipe
from secateur.report_page.claims import (
    claims,
    draft_claims,
    evidence,
    fit_claims,
    fit_summary,
    quality_rows,
)
from secateur.report_page.figures import (
    alike,
    all_figures,
    curves,
    drift,
    heat_maps,
    memory_charts,
    size_chart,
    speed_charts,
)
from secateur.report_page.records import Records, Reported, ReportedRun, read_records
from secateur.reporting.cards import prune_card, shown_place, with_dense_card, without_folders
from secateur.reporting.charts import page_svg, save_plots
from secateur.reporting.draft import DraftResult
from secateur.reporting.fit import FitResult
from secateur.reporting.sweep import SweepResult
from secateur.reporting.tables import (
    Block,
    Line,
    Result,
    Table,
    bare_name,
    binary_size,
    by_layer,
    counted,
    percent,
)
from secateur.runs.output import check_writable
from secateur.runs.records.run import Manifest


def report(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    plots: bool = False,
    card: str | Path | None = None,
) -> ReportResult:
    """Write one page with all measurements of pruned models, side by side.

    Args:
        runs: run folders, compressed or not; folders of sweeps, fits and drafts; JSON files of
            advice.
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
    _write_page(records, page)
    written: list[Path] = []
    if plots:
        folder = page.with_name(f"{page.stem}-plots")
        folder.mkdir(parents=True, exist_ok=True)
        for chart in all_figures(records):
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in chart.key)
            written += save_plots([chart], folder / name)
    if card is None:
        return ReportResult(page, written)
    card = Path(card)
    pictures = _pictures(records, written, card.parent)
    card.write_text(_card_text(records.runs[0], pictures), encoding="utf-8", newline="\n")
    return ReportResult(page, written, card)


def report_recipe(recipe: ReportRecipe, progress: Progress) -> ReportResult:
    """Carry out a recipe."""
    return report(**dict(recipe))


def write_advice(name: str, advice: AdviseResult, page: Path) -> None:
    """Write the page about an advice."""
    _write_page(Records(advices=(Reported(name, page, advice),)), page)


def _write_page(records: Records, page: Path) -> None:
    """Write the page about some records."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = ((TEMPLATES / part).read_text("utf-8") for part in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bare"] = without_folders
    text = environment.get_template("page.html.jinja").render(
        **_content(records),
        svg=lambda chart: Markup(page_svg(chart)),
        style=Markup(style),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version(DISTRIBUTION),
        date=datetime.date.today().isoformat(),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8", newline="\n")


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


TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Voice:
    """The text that one model generated for a prompt."""

    name: str
    text: str
    ours: bool = True
    degenerate: bool = False


def _content(records: Records) -> dict[str, Any]:
    """All values that the template needs, and the functions that it calls."""
    runs = records.runs
    return {
        "title": _title(records),
        "lead": lead(records),
        "sections": _sections(records),
        "records": records,
        "alike": alike(runs),
        "quality": quality_rows(runs),
        "curves": curves(records),
        "drift": drift(runs),
        "bars": [size_chart(runs), *speed_charts(runs), *memory_charts(runs)],
        "samples": _samples(runs),
        "provenance": [
            *(*map(_of_run, records.runs), *map(_of_sweep, records.sweeps)),
            *(*map(_of_fit, records.fits), *map(_of_draft, records.drafts)),
            *map(_of_advice, records.advices),
        ],
        "made_by": _made_by,
        "claims": claims,
        "chips": chips,
        "heat_maps": heat_maps,
        "findings": lambda run: by_severity(run.diagnosis.findings if run.diagnosis else ()),
        "sweep_lines": _sweep_lines,
        "fit_summary": fit_summary,
        "fit_claims": fit_claims,
        "draft_claims": draft_claims,
        "tables_of": lambda result: [x for x in result.blocks() if isinstance(x, Table)],
    }


def _title(records: Records) -> str:
    """The title of the page."""
    models = [run.manifest.source.name for run in records.runs]
    models += [sweep.result.sweep.model for sweep in records.sweeps]
    models += [*(fit.name for fit in records.fits), *(draft.name for draft in records.drafts)]
    models += [advice.result.model for advice in records.advices]
    names = list(dict.fromkeys(bare_name(name) for name in models))
    subject = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    contents = _contents(records)
    if len(contents) > 1:
        return f"{subject}: {', '.join(contents[:-1])} and {contents[-1]}"
    if len(records.runs) == 1:
        manifest = records.runs[0].manifest
        if manifest.structure is not None:
            return f"{subject}, cut to {percent(1 - manifest.structure.decoder_removed, 2)}"
        return f"{subject}, pruned to {percent(manifest.result.decoder_sparsity, 2)}"
    if records.runs:
        return f"{subject}: {len(records.runs)} pruned models compared"
    if records.sweeps:
        return f"{subject}: quality against sparsity"
    if records.fits:
        return f"{subject}: fitted to a budget"
    if records.drafts:
        return f"{subject}: faster with the same output"
    return f"{subject}: does it pay?"


def _contents(records: Records) -> list[str]:
    """What the page is about, by kind."""
    points = sum(len(sweep.result.points) for sweep in records.sweeps)
    counts = {
        "pruned model": len(records.runs),
        "sweep": len(records.sweeps),
        "fit": len(records.fits),
        "draft": len(records.drafts),
    }
    found = [counted(count, name) for name, count in counts.items() if count]
    found = [x + f" of {points} points" * ("sweep" in x) for x in found]
    return found + ["advice"] * bool(records.advices)


def lead(records: Records) -> str:
    """A sentence about what the page claims."""
    measured = (records.runs, records.sweeps, records.fits, records.drafts)
    if records.advices and not any(measured):
        return (
            "Nothing was run. Numbers are published, estimated by formulas, or times measured here."
        )
    return "Only what was measured is claimed; where something was not, it says how to."


def _sections(records: Records) -> list[tuple[str, str]]:
    """The sections of the page, for the links at its head."""
    ours = records.runs
    found = [
        ("headline", "Headline", True),
        ("advice", "Advice", records.advices),
        ("fit", "Fit", records.fits),
        ("draft", "Draft", records.drafts),
        ("quality", "Quality", ours),
        ("sparsity", "Sparsity", records.sweeps or curves(records)),
        ("layers", "Layers", ours),
        ("size", "Size and speed", ours),
        ("samples", "Samples", ours),
        ("findings", "Findings", ours),
        ("provenance", "Provenance", True),
    ]
    return [(key, name) for key, name, there in found if there]


def _made_by(run: ReportedRun) -> str:
    """A line about how the run was made."""
    method, result, cost = run.manifest.method, run.manifest.result, run.manifest.cost
    effort = f" ({method['effort']})" if method.get("effort") else ""
    cut = run.manifest.structure
    lost = f"{percent(result.decoder_sparsity, 2)} zeros in the decoder's matrices"
    if cut is not None:
        lost = f"{percent(cut.decoder_removed, 2)} of the decoder cut out"
    return (
        f"{method.get('name', '?')}{effort}, {method.get('pattern', '?')}, {lost}; pruned in "
        f"{cost.seconds:.0f} s with {binary_size(cost.peak_resident_bytes)}"
    )


def chips(run: ReportedRun) -> list[tuple[str, str]]:
    """Short labels with the results of the diagnosis and of the generated texts."""
    labels: list[tuple[str, str]] = []
    if run.diagnosis:
        counts = {s: sum(f.severity == s for f in run.diagnosis.findings) for s in SEVERITIES}
        labels = [(s, counted(n, s)) for s, n in counts.items() if n]
        labels = labels or [("good", "diagnosis: healthy")]
    for texts in run.evaluation.generation if run.evaluation else ():
        dense = texts.reference_degenerate or 0
        if texts.degenerate > dense:
            words = f"{counted(texts.degenerate, 'degenerate text')}, dense {dense}"
            labels.append(("error", words))
    return labels


def _sweep_lines(result: SweepResult) -> tuple[str, str]:
    """What was swept; then the dense model's perplexity, and the best method at each sparsity."""
    methods = list(dict.fromkeys(point.method for point in result.points))
    made = f"{bare_name(result.sweep.model)}: {', '.join(methods)}; {len(result.points)} points"
    sentences = []
    for text in result.texts[:1]:
        sentences.append(f"Dense: perplexity {result.dense[text]:.2f} on {bare_name(text)}.")
        for pattern, sparsity in dict.fromkeys((p.pattern, p.sparsity) for p in result.points):
            alike = [p for p in result.points if (p.pattern, p.sparsity) == (pattern, sparsity)]
            best = min(alike, key=lambda p: p.perplexity[text])
            place = percent(sparsity) if pattern == "unstructured" else pattern
            lead = "Best at" if len(alike) > 1 else "At"
            sentences.append(f"{lead} {place}: {best.method}, {best.perplexity[text]:.2f}.")
    return made, " ".join(sentences)


def _samples(runs: Sequence[ReportedRun]) -> dict[str, list[Voice]]:
    """The generated texts by prompt: first the dense model's, if it is known."""
    prompts: dict[str, list[Voice]] = {}
    written = ((run, x) for run in runs if run.evaluation for x in run.evaluation.generation)
    for run, texts in written:
        name = run.name
        if texts.inherited_from is not None:
            name = f"{bare_name(texts.inherited_from)}, same weights as {name}"
        for sample in texts.samples:
            voices = prompts.setdefault(sample.prompt, [])
            loops = (sample.reference_repetition or 0) > DEGENERATE
            text = (sample.reference_text or "").strip()
            dense = Voice("dense", text, ours=False, degenerate=loops)
            if sample.reference_text is not None and dense not in voices:
                voices.insert(sum(not voice.ours for voice in voices), dense)
            voices.append(Voice(name, sample.text.strip(), degenerate=sample.degenerate))
    return prompts


Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Part:
    """The provenance of one run or sweep: tables of facts under headings, and a recipe."""

    name: str
    tables: list[tuple[str, Facts]]
    recipe: str = ""


def _of_run(run: ReportedRun) -> Part:
    """Everything that a run and its measurements depend on."""
    m = run.manifest
    cut, planned = m.structure, m.plan.get("peak_bytes")
    result = {
        "zeros in the decoder's matrices": percent(m.result.decoder_sparsity, 2),
        "zeros in all parameters": percent(m.result.model_sparsity, 2),
        "parameters": f"{m.result.parameters:,}",
        "parameters before": cut and f"{cut.before.parameters:,}",
        "decoder cut out": cut and percent(cut.decoder_removed, 2),
    }
    cost = {
        "time": f"{m.cost.seconds:.1f} s" + ", resumed" * m.cost.resumed,
        "peak memory": binary_size(m.cost.peak_resident_bytes),
        "planned memory": None if planned is None else binary_size(planned),
    }
    tables = [
        ("Source", _facts({"folder": run.place, **m.source.model_dump(), "family": m.family})),
        ("Method", _facts({**m.method, "allocation": m.allocation})),
        ("Calibration", _facts(m.calibration or {"text": "none needed"})),
        ("Result", _facts(result)),
        ("Not pruned", [(x.names, f"{x.reason}, {x.weights:,} weights") for x in m.left]),
        ("Reached by calibration", _facts(_reached(m))),
        ("Cost", _facts(cost)),
        ("Pruned with", _facts(m.environment)),
    ]
    for found in run.evaluation.results if run.evaluation else ():
        held = {"reference": found.reference, "measured on": found.inherited_from}
        table = _facts({**held, **_differing(found.environment, m.environment)})
        if ("Judged with", table) not in tables:
            tables.append(("Judged with", table))
    if run.bench:
        tables.append(("Timed with", _facts(_differing(run.bench.protocol, m.environment))))
    if run.compression:
        formats = ", ".join(run.compression.formats)
        tables.append(("Stored as", _facts({"formats": formats})))
    return Part(run.name, [table for table in tables if table[1]], without_folders(run.recipe))


def _reached(manifest: Manifest) -> dict[str, Any]:
    """How many matrices calibration reached, and the experts that no token reached."""
    reach, found = manifest.reach, dict[str, Any]()
    if (fewest := reach.get("fewest_tokens")) is not None:
        found["matrices"] = f"{reach['pruned']:,} of {reach['matrices']:,}"
        found["fewest tokens of one"] = f"{fewest:,}"
    return {**found, "experts without tokens": by_layer((manifest.experts or {}).get("silent", {}))}


def _of_sweep(sweep: Reported[SweepResult]) -> Part:
    """Everything that the points of a sweep share."""
    result = sweep.result
    tables = [
        ("Conditions", _facts(result.sweep.conditions)),
        ("Calibration", _facts(result.sweep.calibration or {"text": "none needed"})),
        *((f"Perplexity on {text}", _facts(result.sweep.protocol[text])) for text in result.texts),
        ("Made with", _facts(result.sweep.environment)),
    ]
    return Part(sweep.name, tables)


def _of_fit(fit: Reported[FitResult]) -> Part:
    """The bounds of a fit, its candidates, and how the winner is stored."""
    result = fit.result
    bounds: dict[str, Any] = {"folder": shown_place(fit.place)}
    bounds |= {one.flag: one.format_value(one.wanted) for one in result.checks}
    made = [one.name for one in result.finalists]
    stored = {name: f"{one.matrices} matrices" for name, one in result.packed.formats.items()}
    tables = [
        ("Bounds", _facts(bounds)),
        ("Made", _facts({"candidates": made, "seconds": result.seconds})),
        ("Stored as", _facts(stored)),
    ]
    return Part(fit.name, [table for table in tables if table[1]])


def _of_draft(draft: Reported[DraftResult]) -> Part:
    """The parent of a draft, and how it is stored."""
    result = draft.result
    made: dict[str, Any] = {"folder": shown_place(draft.place), "parent": bare_name(result.parent)}
    made |= {"candidates": [one.name for one in result.candidates], "seconds": result.seconds}
    stored = {name: f"{one.matrices} matrices" for name, one in result.packed.formats.items()}
    return Part(draft.name, [("Made", _facts(made)), ("Stored as", _facts(stored))])


def _of_advice(advice: Reported[AdviseResult]) -> Part:
    """What an advice counts with: the model, the device, prices and losses with their sources."""
    result = advice.result
    question, known = result.question, result.facts
    efficiency = known.efficiency[question.hardware.kind]
    sizes = asdict(question.model)
    del sizes["kinds"]
    model = {name: value for name, value in sizes.items() if value}
    model["attention"] = result.format_cache()
    device = question.hardware.model_dump(mode="json")
    losses = {name: f"keeps {loss.kept[0]:.1%} to {loss.kept[1]:.1%}; {loss.source}"
              for name, loss in known.compressions.items()}  # fmt: skip
    prices = {name: f"{api.input:g} and {api.output:g} USD a million; {api.source}"
              for name, api in known.apis.items()}  # fmt: skip
    pruning = {name: f"{seconds:g} s" for name, seconds in known.pruning_seconds_of_7b.items()}
    return Part(
        advice.name,
        [
            ("Model", _facts(model)),
            ("Device", _facts({**device, "times": result.speed_basis})),
            ("Facts", _facts({"collected": known.date, **efficiency.model_dump()})),
            ("Accuracy kept, published", _facts(losses)),
            ("Hosted models: prompt and answer", _facts(prices)),
            ("Pruning 7 B on one A100", _facts(pruning)),
        ],
    )


def _differing(values: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from those already shown."""
    own = {key: value for key, value in values.items() if shown.get(key) != value}
    return own if len(own) == len(values) else {**own, "all else": "as pruned"}


def _facts(values: Mapping[str, Any], section: str = "") -> Facts:
    """Names and values for people. Empty values are left out, sections are flattened."""
    found: Facts = []
    for key, value in values.items():
        name = f"{section}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            found += _facts(value, f"{name}: ")
        elif value is not None and value != "":
            found.append((name, _format_value(value)))
    return found


def _format_value(value: Any) -> str:
    """A value as text for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else without_folders(str(value))


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
