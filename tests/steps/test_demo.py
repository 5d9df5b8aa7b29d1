"""`secateur demo` on a tiny model: what it measures, and what a newcomer reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome
from gguf_models import byte_level
from safetensors.torch import load_file
from tiny import save_tiny
from trained import source_text

from secateur import evaluate
from secateur.evaluation.speed import Speed
from secateur.models.skeleton import quiet_transformers
from secateur.progress import Silent
from secateur.recipes.prune import DemoRecipe
from secateur.steps import demo

Command = Callable[..., Outcome]

SIZES = {"vocab_size": 320, "max_position_embeddings": 512, "hidden_size": 64}
"""As `byte_level` and the windows of a demo need it."""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a small demo, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    model = save_tiny(tmp_path / "model", tokenizer=False, **SIZES)
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
    assert ended.out.count("be made") == 1
    for row in rows.values():
        place = Path(row["place"])
        files = [place] if place.is_file() else [*place.glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        if row["way"] == "dense":  # stored in float32, and counted in bfloat16
            size = 2 * sum(tensor.numel() for tensor in load_file(files[0]).values())
        assert row["file_bytes"] == size
        assert row["perplexity"] > 1
        assert row["tokens_per_second"] > 0
        assert f"{row['perplexity']:.2f}" in ended.out
    judged = evaluate(rows["int4"]["place"], text="other.txt", sequence_length=512, windows=2)
    assert math.isclose(judged.perplexity, rows["int4"]["perplexity"])
    assert (
        rows["dense"]["divergence"] == 0 < rows["int8"]["divergence"] < rows["int4"]["divergence"]
    )
    assert (tmp_path / "demo-run/curve.svg").is_file()


@pytest.mark.slow
def test_presets_above_fast_fit_and_prune_too(
    tmp_path: Path, asked: list[str], secateur: Command
) -> None:
    ended = secateur(*asked, "--effort", "balanced", "--json")
    assert ended.code == 0, ended.err
    rows = {row["way"]: row for row in json.loads(ended.out)["rows"]}
    assert rows["fit, 85% of int4"]["file_bytes"] <= 0.85 * rows["int4"]["file_bytes"]
    assert rows["half zeros, int8"]["file_bytes"] < rows["int8"]["file_bytes"]


@pytest.mark.slow
def test_a_mixture_loses_experts(tmp_path: Path, asked: list[str], secateur: Command) -> None:
    model = save_tiny(tmp_path / "mixture", "qwen3_moe", tokenizer=False, **SIZES)
    byte_level().save_pretrained(model)
    ended = secateur("demo", str(model), *asked[2:], "--json")
    assert ended.code == 0, ended.err
    rows = {row["way"]: row for row in json.loads(ended.out)["rows"]}
    cut = rows["3/4 of the experts, int4"]
    assert cut["failure"] is None
    assert cut["file_bytes"] < rows["int4"]["file_bytes"]
    config = json.loads((tmp_path / cut["place"] / "config.json").read_text())
    assert config["num_local_experts"] == 4  # of five


# between two verbs of a way; while the dense model is judged, and another one; while all are timed
PHASES = [("public_function", 2), ("run_evaluation", 1), ("run_evaluation", 2), ("take_turns", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), PHASES)
def test_a_demo_that_is_killed_goes_on(
    name: str, call: int, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"calibration": "text.txt", "windows": 2, "sequence_length": 64}
    calls = ("structure", {"ffn": 0.5, **text}), ("compress", {"values": "int8"})
    ways = demo.DemoWay("dense", ()), demo.DemoWay("narrower, int8", calls)
    monkeypatch.setattr(demo.Demo, "ways", lambda _: ways)
    speed = Speed("a model", (0.5,))
    monkeypatch.setattr(demo, "take_turns", lambda backends, **_: [speed] * len(backends))
    recipe = DemoRecipe(model=asked[1], source="text.txt", text="other.txt", text_windows=1)
    whole = demo.run_demo(recipe.model_copy(update={"output": "whole"}), Silent())
    seen, function = count(1), getattr(demo, name)

    def killed(*given: Any, **options: Any) -> Any:
        if next(seen) == call:
            raise KeyboardInterrupt
        return function(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(demo, name, killed)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(recipe, Silent())
    again = demo.run_demo(recipe, Silent())
    assert [row.model_copy(update={"place": ""}) for row in again.rows] == [
        row.model_copy(update={"place": ""}) for row in whole.rows
    ]
    made = {file.name for file in (tmp_path / "demo-run").iterdir()}
    assert made == {"demo.json", "curve.svg", "curve.png", "narrower-int8"}


def test_what_no_way_could_do_is_refused_before_any_work(
    tmp_path: Path, asked: list[str], secateur: Command
) -> None:
    ended = secateur(*asked, "--text", "missing.txt")
    assert (ended.code, "missing.txt" in ended.err) == (2, True)
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    ended = secateur(*asked)
    assert (ended.code, "tokenizer" in ended.err) == (1, True)
    assert not (tmp_path / "demo-run").exists()


def test_the_sentences_are_what_the_rows_say() -> None:
    named = (("dense", 400, 10.0, 1.0, 50.0), ("int4", 100, 11.0, 1.0, 150.0),
             ("tokens of the text, int4", 80, 12.0, 1.25, 225.0),
             ("llama.cpp Q4_0", 120, 12.0, 1.0, None))  # fmt: skip
    fields = ("way", "file_bytes", "perplexity", "longer", "tokens_per_second")
    rows = [dict(zip(fields, row, strict=True)) | {"commands": ()} for row in named]
    known = {"model": "m", "output": "mine", "protocol": {"cpu": "a processor"}, "rows": rows}
    said = str(demo.DemoResult.model_validate(known, strict=False))
    assert "int4 beside dense: 4.00x smaller, 3.00x as fast, 0.095 nats lost against 0.000" in said
    assert "int4 beside llama.cpp Q4_0: 1.20x smaller, 0.095 nats lost against 0.182" in said
    # 225 tokens are those of 180 tokens of the dense model
    assert "int4 beside int4: 1.25x smaller, 1.20x as fast, 0.182 nats" in said
