"""The whole judgement: record, file, command line, faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from task_rows import write_task
from tiny import save_tiny, tiny_tokenizer
from zoo import tiny_model

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.evaluation import generation
from secateur.evaluation.generation import check_generation, repetition
from secateur.runs.measured import EvaluationRecord, read_evaluation


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("hellaswag", "boolq"):
        write_task(tmp_path / "data", name, 8)
    return tmp_path / "data"


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated texts of few tokens: 64 of each prompt would take most of the time."""
    monkeypatch.setitem(check_generation.__kwdefaults__, "new_tokens", 6)


@pytest.mark.usefixtures("short_texts")
def test_everything_at_once(dense, pruned, text, data, tmp_path, command) -> None:
    done = command(
        "evaluate", pruned, "--dense", dense, "--text", text,
        "--sequence-length", 32, "--tasks", "hellaswag, boolq", "--task-data", data,
        "--limit", 6, "--shots", 1, "--generation", "--output", tmp_path / "e.json", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    saved = json.loads((pruned / "secateur" / "evaluation.json").read_text())
    assert found == saved == json.loads((tmp_path / "e.json").read_text())
    assert next(iter(saved)) == "schema"
    assert saved["schema"] == "secateur.evaluation/2"
    record = read_evaluation(tmp_path / "e.json")
    assert record.to_json() == found
    assert record.model == str(pruned)
    assert {one.reference for one in record.results} == {str(dense)}
    assert all(one.environment["device"] == "cpu" for one in record.results)
    (one,) = record.perplexity
    assert one.reference_perplexity == pytest.approx(
        secateur.evaluate(dense, text=text, sequence_length=32).perplexity, rel=1e-5
    )
    assert one.perplexity == pytest.approx(
        secateur.evaluate(pruned, text=text, sequence_length=32).perplexity, rel=1e-5
    )
    assert record.divergence[0].kl > 0
    assert [(t.task, t.metric) for t in record.tasks] == [
        ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("boolq", "acc"),
    ]  # fmt: skip
    for task in record.tasks:
        assert (task.items, task.shots) == (6, 1)
        assert task.difference == pytest.approx(task.value - task.reference_value)
    (texts,) = record.generation
    assert len(texts.samples) == 8
    assert all(s.reference_text is not None for s in texts.samples)


def test_kinds_of_text_that_the_dense_model_writes(dense, pruned, monkeypatch, command) -> None:
    monkeypatch.setattr(generation, "NEW_TOKENS", 6)
    done = command("evaluate", pruned, "--dense", dense, "--kinds")
    assert done.code == 0, done.err
    record = read_evaluation(pruned / "secateur" / "evaluation.json")
    assert record.perplexity == []
    assert [one.protocol["kind"] for one in record.divergence] == ["prose", "code", "chat", "lists"]
    for one in record.divergence:
        assert 0 < one.acceptance < 1
        assert one.acceptance_standard_error > 0
        assert 4 <= one.tokens <= 24
        assert f"{one.acceptance:.4f}" in done.out
    same = secateur.evaluate(dense, dense=dense, kinds=True).divergence
    assert [one.acceptance for one in same] == pytest.approx([1.0] * 4, abs=1e-5)
    texts = [one.protocol["token_ids"] for one in record.divergence]
    assert [one.protocol["token_ids"] for one in same] == texts


def test_loaded_models(text: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(RecipeError, match="tokenizer="):
        secateur.evaluate(model, generation=True)
    record = secateur.evaluate(
        model, dense=model, tokenizer=tokenizer, text=text, sequence_length=16
    )
    assert record.divergence[0].kl == 0
    assert record.protocol_id == (
        secateur.evaluate(model, text=text, tokenizer=tokenizer, sequence_length=16).protocol_id
    )
    assert (record.tasks, record.generation) == ([], [])


def test_a_model_without_tokenizer(tmp_path: Path, text: Path, command) -> None:
    folder = save_tiny(tmp_path / "bare", tokenizer=False)
    done = command("evaluate", folder, "--text", text)
    assert done.code == 1
    assert "no tokenizer" in done.err


def test_a_reference_that_reads_other_tokens(dense, text, tmp_path) -> None:
    other = save_tiny(tmp_path / "other", max_position_embeddings=512)
    tiny_tokenizer(add_bos=True).save_pretrained(other)
    with pytest.raises(RecipeError, match="different tokens"):
        secateur.evaluate(dense, dense=other, text=text, sequence_length=32)


def test_a_file_of_another_schema(dense: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    record = secateur.evaluate(dense, text=text, sequence_length=32, output=file)
    values = json.loads(file.read_text())
    assert EvaluationRecord.model_validate(values) == record.record
    del values["perplexity"][0]["protocol_id"]
    values["schema"] = "secateur.evaluation/3"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as raised:
        read_evaluation(file)
    for message in ("perplexity.0.protocol_id", "schema"):
        assert message in str(raised.value)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"\.json"):
        read_evaluation(file)
    with pytest.raises(CheckpointError, match=r"\.json"):
        read_evaluation(tmp_path / "none.json")


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert repetition([7] * 13) == pytest.approx(9 / 10)


def test_loops_and_silence_are_degenerate(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"loop": "abc" * 9, "silence": "", "speech": "the lamp by a river"}
    monkeypatch.setattr(generation, "generate", lambda _m, _t, prompt, _n: texts[prompt])
    samples = check_generation(None, tiny_tokenizer(), prompts=[*texts])
    assert {one.prompt: one.degenerate for one in samples} == {
        "loop": True, "silence": True, "speech": False,
    }  # fmt: skip
    assert samples[0].repetition == pytest.approx(1 - 3 / 24)


def test_texts_are_greedy_and_of_the_asked_length() -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    first, again = (
        check_generation(model, tokenizer, prompts=["abc"], new_tokens=5) for _ in range(2)
    )
    assert first == again
    assert len(first[0].text) <= 5
