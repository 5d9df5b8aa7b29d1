"""The measurements of a run as sections of its model card: the page's numbers in Markdown."""

from __future__ import annotations

from secateur.publishing import without_folders
from secateur.reporting.report.headline import claims
from secateur.reporting.report.quality import quality_rows
from secateur.reporting.report.records import ReportedRun
from secateur.reporting.results.sweep import markdown_row
from secateur.reporting.wording import binary_size


def evidence(run: ReportedRun) -> str:
    """The sections headline, quality, speed and findings, as far as they were measured."""
    parts = [
        _headline_section(run),
        _quality_section(run),
        _speed_section(run),
        _findings_section(run),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline_section(run: ReportedRun) -> str:
    """The claims that have a measurement."""
    lines = [f"- **{c.title} {c.value}**: {c.told}" for c in claims(run) if c.measured]
    return "\n".join(["## In short", "", *lines]) if lines else ""


def _quality_section(run: ReportedRun) -> str:
    """The table of quality."""
    rows = quality_rows([run])
    if not rows:
        return ""
    lines = [
        "## Quality",
        "",
        "± is one standard error. Numbers can be compared if their protocol ids begin alike; what "
        "follows says how the model computed.",
        "",
        markdown_row(["measure", "chance", "dense", "this model", "beside dense", "protocol"]),
        "|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        cell = row.cells[run.name]
        said = {"same": "no significant difference", "": ""}
        verdict = said.get(cell.verdict, f"significantly {cell.verdict}")
        beside = ", ".join(filter(None, (cell.beside, verdict)))
        lines.append(
            markdown_row(
                [row.measure, row.chance, row.dense, cell.value, beside, f"`{cell.protocol_id}`"]
            )
        )
    return "\n".join(lines)


def _speed_section(run: ReportedRun) -> str:
    """Tokens per second of each way to run the model."""
    ran = [c for c in run.bench.contenders if c.tokens_per_second] if run.bench else []
    if not ran or run.bench is None:
        return ""
    p = run.bench.protocol
    lines = [
        "## Speed",
        "",
        f"Batch 1 on {p.get('cpu', '?')}, {p.get('threads', '?')} threads; "
        f"{p.get('prompt_tokens', '?')} tokens read, {p.get('new_tokens', '?')} written.",
        "",
        markdown_row(["", "tokens a second", "memory"]),
        "|---|---:|---:|",
    ]
    for contender in ran:
        memory = contender.resident_bytes
        size = binary_size(memory) if memory else ""
        lines.append(
            markdown_row([contender.contender, f"{contender.tokens_per_second:.1f}", size])
        )
    return "\n".join(lines)


def _findings_section(run: ReportedRun) -> str:
    """The findings of a diagnosis."""
    if run.diagnosis is None:
        return ""
    lines = [
        f"- {f.severity}: {f.id}, {f.where}. {f.evidence} Remedy: {f.remedy}"
        for f in run.diagnosis.findings
    ]
    found = "\n".join(lines or ["Nothing was found."])
    return f"## Diagnosis\n\n{without_folders(found)}"
