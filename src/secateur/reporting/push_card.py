"""The card of a published model: the card of its folder, with its results and their protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.reporting.front_matter import OURS, split_card
from secateur.reporting.report.evidence import evidence
from secateur.reporting.report.records import ReportedRun
from secateur.runs.records.measured import EvaluationRecord

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
    told = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{told}---\n{body}"


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
    told = {
        "license": "the card names no licence: add it to README.md",
        "base_model": "the card names no base model: add --base-model OWNER/NAME",
    }
    return [note for key, note in told.items() if not data.get(key)]
