"""The measurements of a run as sections of its model card: the page's numbers in Markdown.

The card of a published model: the card of its folder, with its results and their protocols.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.publishing import without_folders
from secateur.reporting.cards import OURS, split_card
from secateur.reporting.report.headline import claims
from secateur.reporting.report.quality import quality_rows
from secateur.reporting.report.records import ReportedRun
from secateur.reporting.results.sweep import markdown_row
from secateur.reporting.tables import binary_size
from secateur.runs.records.measured import EvaluationRecord


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
    lines = [f"- **{c.title} {c.value}**: {c.description}" for c in claims(run) if c.measured]
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
        comparison = ", ".join(filter(None, (cell.comparison, verdict)))
        lines.append(
            markdown_row(
                [
                    row.measure,
                    row.chance,
                    row.dense,
                    cell.value,
                    comparison,
                    f"`{cell.protocol_id}`",
                ]
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
    for timing in ran:
        memory = timing.resident_bytes
        size = binary_size(memory) if memory else ""
        lines.append(markdown_row([timing.contender, f"{timing.tokens_per_second:.1f}", size]))
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


TEXT_GENERATION = {"type": "text-generation"}


def push_card(card: str, repo: str, run: ReportedRun | None, base_model: str | None = None) -> str:
    """The text of README.md for the hub.

    Licence, language and base model are those of the folder's card. Results are added as sections,
    and in the form that the hub reads (`model-index`); each names its protocol.

    Args:
        card: the card of the folder.
        repo: the repository.
        run: the records of the folder; None without a manifest.
        base_model: the base model on the hub; None for the one that the card names.
    """
    front, body = split_card(card)
    data: dict[str, Any] = (yaml.safe_load(front.strip("-\n")) or {}) if front else {}
    tags = data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*tags, OURS]))
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    data |= {"base_model": base_model} if base_model else {}
    if run is not None and run.evaluation is not None:
        results = [*_perplexities(run.evaluation), *_scores(run.evaluation)]
        if results:
            name = Path(repo).name
            data["model-index"] = [{"name": name, "results": results}]
    measured = evidence(run) if run is not None else ""
    if measured and measured not in body:
        body = f"{body.rstrip()}\n\n{measured}\n"
    header = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{body}"


def _perplexities(found: EvaluationRecord) -> list[dict[str, Any]]:
    """The perplexities in the form that the hub reads."""
    return [
        {
            "task": TEXT_GENERATION,
            "dataset": {"type": one.text, "name": one.text},
            "metrics": [
                {
                    "type": "perplexity",
                    "value": one.perplexity,
                    "name": f"perplexity, protocol {one.protocol_id}",
                }
            ],
        }
        for one in found.perplexity
    ]


def _scores(found: EvaluationRecord) -> list[dict[str, Any]]:
    """The scores of tasks in the form that the hub reads."""
    return [
        {
            "task": TEXT_GENERATION,
            "dataset": {"type": one.task, "name": one.task},
            "metrics": [
                {
                    "type": one.metric,
                    "value": one.value,
                    "name": f"{one.metric}, {one.shots} shots, protocol {one.protocol_id}",
                }
            ],
        }
        for one in found.tasks
    ]


def missing_in(card: str) -> list[str]:
    """What the head of a card lacks, and how to add it."""
    front, _ = split_card(card)
    data = yaml.safe_load(front.strip("-\n")) or {} if front else {}
    notes = {
        "license": "the card names no licence: add it to README.md",
        "base_model": "the card names no base model: add --base-model OWNER/NAME",
    }
    return [note for key, note in notes.items() if not data.get(key)]
