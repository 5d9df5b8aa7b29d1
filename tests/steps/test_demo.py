"""`secateur demo` on a tiny model: what it measures, and what a newcomer reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome
from gguf_models import byte_level
from safetensors.torch import load_file
from tiny import save_tiny
from trained import source_text

from secateur import evaluate
from secateur.models.skeleton import quiet_transformers

Command = Callable[..., Outcome]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a small demo, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "hidden_size": 64}
    model = save_tiny(tmp_path / "model", tokenizer=False, **sizes)
    with quiet_transformers():
        tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text(source_text()[:40_000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(source_text(held_out=True)[:20_000], encoding="utf-8")
    texts = ["--calibration", "text.txt", "--text", "other.txt"]
    return ["demo", str(model), *texts, "--windows", "4", "--text-windows", "2"]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in json.loads((folder / "demo.json").read_text())["rows"]}


@pytest.mark.slow
def test_every_way_is_made_judged_and_timed(
    tmp_path: Path, asked: list[str], secateur: Command
) -> None:
    ended = secateur(*asked)
    assert ended.code == 0, ended.err
    rows = rows_of(tmp_path / "demo-run")
    assert [*rows] == [
        "dense", "int8", "int4", "llama.cpp Q8_0", "llama.cpp Q4_0", "tokens of the text, int4"
    ]  # fmt: skip
    whole = rows.pop("tokens of the text, int4")
    assert "all 320 tokens" in whole["failure"]
    assert "all 320 tokens" in ended.out
    for row in rows.values():
        place = Path(row["place"])
        files = [place] if place.is_file() else [*place.glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        if row["way"] == "dense":  # stored in float32, and counted in bfloat16
            size = 2 * sum(tensor.numel() for tensor in load_file(files[0]).values())
        assert row["file_bytes"] == size
        assert row["perplexity"] > 1
        assert f"{row['perplexity']:.2f}" in ended.out
    judged = evaluate(rows["int4"]["place"], text="other.txt", sequence_length=512, windows=2)
    assert math.isclose(judged.perplexity, rows["int4"]["perplexity"])
    assert (
        rows["dense"]["divergence"] == 0 < rows["int8"]["divergence"] < rows["int4"]["divergence"]
    )
    assert rows["dense"]["tokens_per_second"] > 0
    assert (tmp_path / "demo-run/curve.svg").is_file()


@pytest.mark.slow
def test_a_stopped_demo_goes_on(tmp_path: Path, asked: list[str], secateur: Command) -> None:
    assert secateur(*asked).code == 0
    folder = tmp_path / "demo-run"
    known = json.loads((folder / "demo.json").read_text())
    made = (folder / "int4/secateur.safetensors").stat().st_mtime_ns
    stopped = {**known, "rows": known["rows"][:3], "draft": None}
    (folder / "demo.json").write_text(json.dumps(stopped))
    (folder / "llama.cpp-Q8_0/half").write_text("of a call that was stopped")
    assert secateur(*asked).code == 0
    assert (folder / "int4/secateur.safetensors").stat().st_mtime_ns == made
    assert not (folder / "llama.cpp-Q8_0/half").exists()
    assert [*rows_of(folder)] == [row["way"] for row in known["rows"]]


@pytest.mark.slow
def test_presets_above_fast_fit_and_prune_too(
    tmp_path: Path, asked: list[str], secateur: Command
) -> None:
    ended = secateur(*asked, "--effort", "balanced", "--json")
    assert ended.code == 0, ended.err
    rows = {row["way"]: row for row in json.loads(ended.out)["rows"]}
    assert rows["fit, 85% of int4"]["file_bytes"] <= 0.85 * rows["int4"]["file_bytes"]
    assert rows["half of the weights zero, int8"]["file_bytes"] < rows["int8"]["file_bytes"]


def test_a_demo_goes_on_only_where_the_same_demo_began(
    tmp_path: Path, asked: list[str], secateur: Command
) -> None:
    ended = secateur(*asked, "--output", "model")
    assert (ended.code, "exists" in ended.err) == (2, True)
    assert (tmp_path / "model/model.safetensors").is_file()
    (tmp_path / "mine").mkdir()
    other = {"model": "another", "output": "mine", "protocol": {}}
    (tmp_path / "mine/demo.json").write_text(json.dumps(other))
    ended = secateur(*asked, "--output", "mine")
    assert (ended.code, "other options" in ended.err) == (2, True)
