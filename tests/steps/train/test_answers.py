"""Training on conversations: the loss counts answers, unless whole conversations are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trained import source_text
from trainings import assert_same, make_place, stopped_at, tensors, train_in

from secateur.errors import RecipeError, SourceError
from secateur.models.configuration import read_configuration
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.train import TrainRecipe
from secateur.training.batches import read_training_text

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with a chat template, conversations, and a text."""
    place = make_place(tmp_path_factory.mktemp("answers"), pattern="2:4")
    (place / "pruned" / "chat_template.jinja").write_text(TEMPLATE)
    for name, text in (("chats", source_text()), ("watched", source_text(held_out=True))):
        lines = [line for line in text.splitlines() if len(line.strip()) > 20][:400]
        pairs = zip(lines[::2], lines[1::2], strict=True)
        rows = [
            {
                "messages": [
                    {"role": "user", "content": one},
                    {"role": "assistant", "content": other},
                ]
            }
            for one, other in pairs
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def text_of(place: Path, *texts: str, **options: Any) -> Any:
    names = [str(place / text) for text in texts]
    recipe = TrainRecipe(model="m", text=names, sequence_length=64, **options)
    read, watched, record = read_training_text(recipe, place / "pruned", read_config(place), 4)
    return SimpleNamespace(
        windows=read.windows, answers=read.answers, record=record,
        validation=watched and watched.windows, validation_answers=watched and watched.answers,
    )  # fmt: skip


def read_config(place: Path) -> Any:
    from transformers import AutoConfig

    assert read_configuration(place / "pruned")
    return AutoConfig.from_pretrained(place / "pruned")


def test_answers_of_windows(place: Path) -> None:
    text = text_of(place, "chats.jsonl")
    assert text.answers.shape == text.windows.shape
    assert text.validation_answers.shape == text.validation.shape
    assert text.record["answer_tokens"] == int(text.answers.sum())
    tokenizer = load_tokenizer(place / "pruned")
    written = [json.loads(x)["messages"] for x in (place / "chats.jsonl").read_text().splitlines()]
    spoken = "".join(tokenizer.decode(text.windows[0][text.answers[0]]))
    assert any(chat[1]["content"].strip()[:10] in spoken for chat in written)
    assert not any(chat[0]["content"].strip() in spoken for chat in written)


def test_beside_a_text_all_its_tokens_count(place: Path) -> None:
    text = text_of(place, "chats.jsonl", "text.txt", validation_windows=0)
    assert text.answers[1::2].all()
    assert not text.answers[::2].all()
    assert text_of(place, "text.txt").answers is None
    assert text_of(place, "chats.jsonl", answers_only=False).answers is None
    judged = text_of(place, "text.txt", validation_text=str(place / "watched.jsonl"))
    assert judged.answers is None
    assert judged.validation_answers.shape == judged.validation.shape


def test_answers_alone_of_a_text_without_answers_are_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"--answers-only"):
        text_of(place, "text.txt", answers_only=True)
    assert text_of(place, "chats.jsonl", "text.txt", answers_only=True).answers is not None


def test_training_on_answers(place: Path, tmp_path: Path) -> None:
    """It learns, other things than whole conversations teach; stopped and resumed, the same."""
    options: dict[str, Any] = {
        "text": str(place / "chats.jsonl"), "steps": 6, "sequence_length": 64, "validations": 2,
        "learning_rate": 5e-3, "teacher": place / "dense", "next_token": 0.5, "save_minutes": 0,
    }  # fmt: skip
    done = train_in(place, tmp_path / "answers", **options)
    assert done.perplexity_after < done.perplexity_before
    with stopped_at(4):
        train_in(place, tmp_path / "stopped", **options)
    train_in(place, tmp_path / "stopped", resume=True, **options)
    assert_same(tmp_path / "answers", tmp_path / "stopped")
    whole = train_in(place, tmp_path / "whole", answers_only=False, **options)
    assert whole.perplexity_before != done.perplexity_before
    one, other = tensors(tmp_path / "answers"), tensors(tmp_path / "whole")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_conversations_without_an_answer_are_refused(place: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a question of some length " * 9}]}] * 60
    (place / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SourceError, match="whole-conversations"):
        text_of(place, "asked.jsonl", validation_windows=0)
    assert len(text_of(place, "asked.jsonl", answers_only=False, validation_windows=0).windows) > 4
