"""The page: one HTML file that contains everything it shows.

The templates escape all text from files and models. The page also blocks the network and every
script except its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.diagnostics.findings import SEVERITIES
from secateur.evaluation.generation_checks import DEGENERATE
from secateur.publishing.secrets import without_folders
from secateur.reporting.charts import HeatMap
from secateur.reporting.drawing import draw
from secateur.reporting.report.figures import (
    alike,
    curves,
    drift,
    heat_maps,
    memory_charts,
    size_chart,
    speed_charts,
)
from secateur.reporting.report.fits import fit_view
from secateur.reporting.report.headline import Claim, claims
from secateur.reporting.report.provenance import Part, of_advice, of_fit, of_run, of_sweep
from secateur.reporting.report.quality import quality_rows
from secateur.reporting.report.records import Records, ReportedRun, ReportedSweep
from secateur.reporting.report.what_if import advice_view
from secateur.reporting.results.sweep import SweepResult
from secateur.reporting.wording import bare_name, binary_size, counted, percent
from secateur.runs.evaluation import GenerationRecord
from secateur.runs.records import FindingEntry

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class RunView:
    """The data of a run for the page."""

    run: ReportedRun
    made: str
    claims: list[Claim]
    chips: list[tuple[str, str]]
    heat_maps: list[HeatMap]
    findings: list[FindingEntry]


@dataclass(frozen=True)
class SweepView:
    """The data of a sweep for the page."""

    name: str
    made: str
    told: str
    result: SweepResult


@dataclass(frozen=True)
class Voice:
    """The text that one model generated for a prompt."""

    name: str
    text: str
    ours: bool = True
    degenerate: bool = False


@dataclass(frozen=True)
class PromptView:
    """A prompt and the texts of all models."""

    prompt: str
    voices: list[Voice]


def render(records: Records, *, version: str, date: str) -> str:
    """Write the report as HTML.

    Args:
        records: what to show.
        version: version of secateur.
        date: date of today.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    parts = ["page.js", *(["advisor.js", "what-if.js"] if records.advices else [])]
    script = "\n".join((TEMPLATES / part).read_text(encoding="utf-8") for part in parts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bare"] = without_folders
    page = environment.get_template("page.html.jinja")
    return page.render(
        **content(records),
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        version=version,
        date=date,
    )


def content(records: Records) -> dict[str, Any]:
    """All values that the template needs."""
    runs = records.runs
    drifts = drift(runs)
    return {
        "title": title(records),
        "lead": lead(records),
        "sections": sections(records),
        "views": [view_of(run) for run in runs],
        "fits": [fit_view(fit) for fit in records.fits],
        "advices": [advice_view(advice) for advice in records.advices],
        "sweeps": [sweep_view(sweep) for sweep in records.sweeps],
        "alike": alike(runs),
        "quality": quality_rows(runs),
        "curves": [draw(chart) for chart in curves(records)],
        "drift": draw(drifts) if drifts else None,
        "size": size_chart(runs),
        "speeds": speed_charts(runs),
        "memory": memory_charts(runs),
        "samples": samples(runs),
        "provenance": provenance(records),
        "shown": SHOWN,
    }


SHOWN: Mapping[bool, Callable[[float], str]] = {
    True: lambda value: percent(value, 1),
    False: lambda value: f"{value:.3g}",
}
"""Formats the cell of a heat map; the key says whether the value is a fraction."""


def title(records: Records) -> str:
    """The title of the page."""
    models = [run.manifest.source.name for run in records.runs]
    models += [sweep.result.sweep.model for sweep in records.sweeps]
    models += [fit.name for fit in records.fits]
    models += [advice.result.model for advice in records.advices]
    names = list(dict.fromkeys(bare_name(name) for name in models))
    subject = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
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
    return f"{subject}: does it pay?"


def lead(records: Records) -> str:
    """A sentence about the content of the page."""
    parts = []
    if len(records.runs) > 1 or (records.runs and records.sweeps):
        parts.append(counted(len(records.runs), "pruned model"))
    for sweep in records.sweeps:
        parts.append(f"a sweep of {counted(len(sweep.result.points), 'point')}")
    counts = f"{' and '.join(parts)}. " if parts else ""
    said = f"{counts}Only what was measured is claimed; where something was not, it says how to."
    if records.advices and not (records.runs or records.sweeps or records.fits):
        said = (
            "Nothing was run. Numbers are published, estimated by formulas, or times measured here."
        )
    return said[0].upper() + said[1:]


def sections(records: Records) -> list[tuple[str, str]]:
    """The sections of the page, for the links at its head."""
    ours = bool(records.runs)
    found = [
        ("headline", "Headline", True),
        ("advice", "Advice", bool(records.advices)),
        ("what-if", "What if", bool(records.advices)),
        ("fit", "Fit", bool(records.fits)),
        ("quality", "Quality", ours),
        ("sparsity", "Sparsity", bool(records.sweeps) or bool(curves(records))),
        ("layers", "Layers", ours),
        ("size", "Size and speed", ours),
        ("samples", "Samples", ours),
        ("findings", "Findings", ours),
        ("provenance", "Provenance", True),
    ]
    return [(key, name) for key, name, there in found if there]


def view_of(run: ReportedRun) -> RunView:
    """The data of a run for the page."""
    found = run.diagnosis.findings if run.diagnosis else ()
    ordered = sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
    return RunView(run, made_by(run), claims(run), chips(run), heat_maps(run), ordered)


def made_by(run: ReportedRun) -> str:
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
    told: list[tuple[str, str]] = []
    if run.diagnosis:
        counts = {s: sum(f.severity == s for f in run.diagnosis.findings) for s in SEVERITIES}
        told = [(s, counted(n, s)) for s, n in counts.items() if n]
        told = told or [("good", "diagnosis: healthy")]
    for texts in run.evaluation.generation if run.evaluation else ():
        dense = texts.reference_degenerate or 0
        if texts.degenerate > dense:
            words = f"{counted(texts.degenerate, 'degenerate text')}, dense {dense}"
            told.append(("error", words))
    return told


def sweep_view(sweep: ReportedSweep) -> SweepView:
    """The data of a sweep for the page."""
    result = sweep.result
    methods = list(dict.fromkeys(point.method for point in result.points))
    made = f"{bare_name(result.sweep.model)}: {', '.join(methods)}; {len(result.points)} points"
    told = []
    for text in result.texts[:1]:
        told.append(f"Dense: perplexity {result.dense[text]:.2f} on {bare_name(text)}.")
        for pattern, sparsity in dict.fromkeys((p.pattern, p.sparsity) for p in result.points):
            alike = [p for p in result.points if (p.pattern, p.sparsity) == (pattern, sparsity)]
            best = min(alike, key=lambda p: p.perplexity[text])
            place = percent(sparsity) if pattern == "unstructured" else pattern
            lead = "Best at" if len(alike) > 1 else "At"
            told.append(f"{lead} {place}: {best.method}, {best.perplexity[text]:.2f}.")
    return SweepView(sweep.name, made, " ".join(told), result)


def samples(runs: Sequence[ReportedRun]) -> list[PromptView]:
    """The generated texts by prompt: first the dense model's, if it is known."""
    prompts: dict[str, list[Voice]] = {}
    for run, texts in written(runs):
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
    return [PromptView(prompt, voices) for prompt, voices in prompts.items()]


def written(runs: Sequence[ReportedRun]) -> Iterator[tuple[ReportedRun, GenerationRecord]]:
    """The generated texts of every run."""
    for run in runs:
        for texts in run.evaluation.generation if run.evaluation else ():
            yield run, texts


def provenance(records: Records) -> list[Part]:
    """The provenance of everything on the page."""
    return [
        *(of_run(run) for run in records.runs),
        *(of_sweep(sweep) for sweep in records.sweeps),
        *(of_fit(fit) for fit in records.fits),
        *(of_advice(advice) for advice in records.advices),
    ]
