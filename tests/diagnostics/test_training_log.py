"""Logs of trainings that went well, too fast, and to pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from secateur.diagnostics.training_log import check_training, read_log
from secateur.errors import SourceError


def losses(kind: str, count: int = 300, seed: int = 0) -> list[float | None]:
    """A loss that falls from 3 to 2 with noise; what `kind` says happens at step 200."""
    rng = random.Random(seed)
    logged: list[float | None] = []
    for step in range(count):
        loss = 2 + 0.99**step + rng.gauss(0, 0.08)
        late = step >= 200
        if kind == "rises" and late:
            loss += 2.5
        if kind == "creeps" and late:
            loss += 0.03 * (step - 200)
        if kind == "spike" and 200 <= step < 206:
            loss += 5
        logged.append(None if kind == "lost" and late else loss)
    return logged


def write(file: Path, values: list[float | None]) -> Path:
    lines = [
        json.dumps({"step": i, "loss": x, "learning_rate": 1e-3}) for i, x in enumerate(values)
    ]
    lines.insert(7, json.dumps({"step": 7, "eval_loss": 9.0}))
    file.write_text("\n".join(lines) + "\n\n")
    return file


@pytest.mark.parametrize("kind", ["fine", "spike"])
@pytest.mark.parametrize("seed", range(5))
def test_a_training_that_went_well(kind: str, seed: int, tmp_path: Path) -> None:
    steps = read_log(write(tmp_path / "log.jsonl", losses(kind, seed=seed)))
    assert len(steps) == 300
    assert check_training(steps, "log") == []


@pytest.mark.parametrize("count", [1, 5, 12])
def test_a_short_log_says_nothing(count: int, tmp_path: Path) -> None:
    assert check_training(read_log(write(tmp_path / "l.jsonl", losses("fine", count))), "l") == []


@pytest.mark.parametrize("kind", ["rises", "creeps"])
def test_a_loss_that_rises_and_stays(kind: str, tmp_path: Path) -> None:
    steps = read_log(write(tmp_path / "log.jsonl", losses(kind)))
    (finding,) = check_training(steps, "log.jsonl")
    assert (finding.id, finding.severity) == ("learning-rate-too-high", "warning")
    place, _, step = finding.where.partition(", step ")
    assert place == "log.jsonl"
    assert 190 <= int(step) <= 240
    assert "the learning rate is 0.001" in finding.evidence


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    (finding,) = check_training(read_log(write(tmp_path / "log.jsonl", losses("lost"))), "log")
    assert (finding.id, finding.severity) == ("training-not-finite", "error")
    assert finding.where == "log, step 200"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "log.jsonl:1"),
        ('{"loss": 1.0}\n{"loss": "high"}\n', "log.jsonl:2"),
        ('[1, 2]\n"loss"\n', "log.jsonl:2"),
        ('{"eval_loss": 1.0}\n', "no line of the training log has a loss"),
        ("", "no line of the training log has a loss"),
    ],
)
def test_logs_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(SourceError, match="no such training log"):
        read_log(tmp_path / "none.jsonl")
