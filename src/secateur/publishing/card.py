"""The card of a published model: the folder's own, with its results also as the hub reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.report_page.records import ReportedRun
from secateur.reporting.cards import OURS, split_card, with_measurements
from secateur.runs.records.measured import EvaluationRecord


def push_card(card: str, repo: str, run: ReportedRun, base_model: str | None = None) -> str:
    """The text of README.md for the hub.

    Licence, language and base model are those of the folder's card. Results are added as sections,
    and in the form that the hub reads (`model-index`); each names its protocol.

    Args:
        card: the card of the folder.
        repo: the repository.
        run: the records of the folder.
        base_model: the base model on the hub; None for the one that the card names.
    """
    front, body = split_card(card)
    data: dict[str, Any] = (yaml.safe_load(front.strip("-\n")) or {}) if front else {}
    tags = data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*tags, OURS]))
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    data |= {"base_model": base_model} if base_model else {}
    results = _hub_results(run.evaluation) if run.evaluation else []
    if results:
        data["model-index"] = [{"name": Path(repo).name, "results": results}]
    header = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{with_measurements(body, run.measured())}"


def _hub_results(found: EvaluationRecord) -> list[dict[str, Any]]:
    """Perplexities and scores in the form that the hub reads."""
    numbers = [
        *((x.text, "perplexity", x.perplexity, "perplexity", x) for x in found.perplexity),
        *((x.task, x.metric, x.value, f"{x.metric}, {x.shots} shots", x) for x in found.tasks),
    ]
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": data, "name": data},
            "metrics": [
                {"type": kind, "value": value, "name": f"{name}, protocol {one.protocol_id}"}
            ],
        }
        for data, kind, value, name, one in numbers
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
