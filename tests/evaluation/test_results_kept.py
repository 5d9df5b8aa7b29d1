"""Results of several judgements in one file: what was measured once is not lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from task_rows import write_task

import secateur
from secateur.errors import CheckpointError
from secateur.runs.measured import EvaluationRecord, read_evaluation


@pytest.fixture
def kept(pruned: Path) -> Path:
    return pruned / "secateur" / "evaluation.json"


def test_a_second_call_keeps_what_it_does_not_measure(dense, pruned, text, kept, tmp_path) -> None:
    """On 80ad24a the second call set divergence and generation to null."""
    write_task(tmp_path / "data", "boolq", 6)
    first = secateur.evaluate(
        pruned, dense=dense, text=text, sequence_length=32, generation=True,
        prompts=["the lamp"],
    )  # fmt: skip
    second = secateur.evaluate(pruned, tasks=["boolq"], task_data=tmp_path / "data")
    third = secateur.evaluate(pruned, text=text, sequence_length=16)
    found = read_evaluation(kept)
    assert found.divergence == first.divergence
    assert found.generation == first.generation
    assert found.tasks == second.tasks
    assert found.perplexity == [*first.texts, *third.texts]
    assert [one.reference for one in found.results] == [
        str(dense), None, str(dense), None, str(dense),
    ]  # fmt: skip


def test_the_same_protocol_is_replaced(dense, pruned, text, kept) -> None:
    secateur.evaluate(pruned, dense=dense, text=text, sequence_length=32)
    values = json.loads(kept.read_text())
    values["perplexity"][0]["perplexity"] = values["divergence"][0]["kl"] = 7.0
    kept.write_text(json.dumps(values))
    again = secateur.evaluate(pruned, dense=dense, text=text, sequence_length=32)
    found = read_evaluation(kept)
    assert found.perplexity == again.texts
    assert found.divergence == again.divergence
    assert found.perplexity[0].perplexity != 7.0


def test_what_was_said_of_the_reference_stays(dense, pruned, text, kept, tmp_path) -> None:
    """The same measured again alone: the dense model's numbers still stand beside it."""
    write_task(tmp_path / "data", "boolq", 6)
    options: dict[str, Any] = {
        "text": text, "sequence_length": 32, "tasks": ["boolq"], "limit": 6,
        "task_data": tmp_path / "data", "generation": True, "prompts": ["the lamp"],
    }  # fmt: skip
    first = secateur.evaluate(pruned, dense=dense, **options)
    secateur.evaluate(pruned, **options)
    found = read_evaluation(kept)
    (before,), (after,) = first.texts, found.perplexity
    assert after.reference_perplexity == before.reference_perplexity
    assert after.seconds != before.seconds  # its own numbers are new
    assert {one.reference for one in found.results} == {str(dense)}
    assert found.tasks == first.tasks
    assert found.generation[0].samples == first.generation[0].samples
    values = json.loads(kept.read_text())
    values["tasks"][0] |= {"value": 0.0, "difference": -0.5}
    values["generation"][0]["samples"][0]["text"] = "another"
    kept.write_text(json.dumps(values))
    secateur.evaluate(pruned, **options)
    found = read_evaluation(kept)
    assert found.tasks[0].difference is None  # a comparison with another score
    assert found.generation[0].reference is None


def test_a_damaged_file_is_refused_before_anything_is_measured(pruned, text, kept) -> None:
    kept.write_text('{"schema": "secateur.evalu')
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        secateur.evaluate(pruned, dense="no/such-model", text=text)
    assert kept.read_text() == '{"schema": "secateur.evalu'


def test_a_write_that_is_stopped_leaves_what_was_there(pruned, text, kept, monkeypatch) -> None:
    secateur.evaluate(pruned, text=text, sequence_length=32)
    before = kept.read_text()

    class Killed(BaseException):
        pass

    def killed(descriptor: int) -> None:
        os.truncate(descriptor, 100)  # what had reached the disk
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(Killed):
            secateur.evaluate(pruned, text=text, sequence_length=16)
    assert kept.read_text() == before
    secateur.evaluate(pruned, text=text, sequence_length=16)
    assert len(read_evaluation(kept).perplexity) == 2
    assert os.listdir(kept.parent) == ["evaluation.json"]


def test_marks_of_inheritance_are_replaced_by_measuring(pruned, text, kept) -> None:
    record = secateur.evaluate(pruned, text=text, sequence_length=32)
    marked = record.record.inherited()
    assert [one.inherited_from for one in marked.results] == [str(pruned)]
    other = EvaluationRecord.model_validate({**marked.to_json(), "model": "other"})
    assert other.inherited() == other  # the first that was measured
    marked.save(kept)
    secateur.evaluate(pruned, text=text, sequence_length=32)
    assert [one.inherited_from for one in read_evaluation(kept).results] == [None]
