"""Conversations as the text of prune, evaluate, diagnose and a smaller vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_tiny
from tokenizers_of_kinds import save_tokenizer
from trained import source_text

import secateur
from secateur.calibration.documents import read_documents
from secateur.errors import SourceError
from secateur.models.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, one without, and conversations."""
    place = tmp_path_factory.mktemp("conversations")
    for name in ("plain", "model"):
        tokens = len(save_tokenizer(place / name, "byte-level"))
        save_tiny(place / name, tokenizer=False, vocab_size=tokens, bos_token_id=1, eos_token_id=2)
    (place / "model" / "chat_template.jinja").write_text(TEMPLATE)
    lines = [line for line in source_text().splitlines() if len(line.strip()) > 20][:200]
    rows = [
        {"conversations": [{"from": "human", "value": one}, {"from": "gpt", "value": other}]}
        for one, other in zip(lines[::2], lines[1::2], strict=True)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_every_verb_reads_them(place: Path) -> None:
    text, cut = str(place / "chats.jsonl"), {"windows": 8, "sequence_length": 32}
    pruned = place / "pruned"
    secateur.prune(
        place / "model", output=pruned, sparsity=0.5, method="wanda", calibration=text, **cut
    )
    manifest = json.loads((pruned / "secateur" / "manifest.json").read_text())
    assert len(manifest["calibration"]["chat_template"]) == 16
    assert manifest["calibration"]["documents"] == 100
    found = secateur.evaluate(pruned, text=[text], sequence_length=32, windows=4)
    assert found.perplexity > 1
    secateur.structure(place / "model", vocabulary=text, output=place / "trimmed")
    before, after = (load_tokenizer(place / name) for name in ("model", "trimmed"))
    assert len(after) < len(before)
    chat = read_documents(text)[0]
    assert after.decode(chat.ids(after)) == before.decode(chat.ids(before))


def test_without_a_template_they_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"(?s)no chat template.*chats\.jsonl:\d"):
        secateur.prune(
            place / "plain", output=tmp_path / "out", sparsity=0.5, method="wanda",
            calibration=str(place / "chats.jsonl"), windows=8, sequence_length=32,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
