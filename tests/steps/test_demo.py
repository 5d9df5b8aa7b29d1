"""`secateur demo` on a tiny model: what it writes, and what a newcomer reads."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from commands import Outcome
from gguf_models import byte_level
from tiny import save_tiny
from trained import source_text

from secateur import compress, evaluate
from secateur.models.skeleton import quiet_transformers
from secateur.reporting.tables import binary_size


@pytest.mark.slow
def test_the_demo_prunes_packs_times_judges_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secateur: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "hidden_size": 64}
    model = save_tiny(tmp_path / "model", tokenizer=False, **sizes)
    with quiet_transformers():
        tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text(source_text()[:40_000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(source_text(held_out=True)[:20_000], encoding="utf-8")
    demo = import_module("secateur.steps.demo")
    monkeypatch.setattr(demo, "MODEL", str(model))
    monkeypatch.setattr(demo, "CALIBRATION", str(tmp_path / "text.txt"))
    monkeypatch.setattr(demo, "JUDGING", str(tmp_path / "other.txt"))
    ended = secateur("demo", "--windows", "4", "--text-windows", "2")
    assert ended.code == 0, ended.err
    folder = tmp_path / "demo-run"
    assert (folder / "secateur.safetensors").is_file()
    assert (folder / "README.md").is_file()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "perplexity" in page
    for words in ("tokens per second", "zeros in decoder matrices", "50.00%", "dense writes:"):
        assert words in ended.out
    for place in (folder, folder / "README.md", folder / "report.html"):
        assert f"{place}\n" in ended.out
    assert "\n\n\n" not in ended.out
    rounded = compress(model, output=tmp_path / "int8", values="int8", embeddings="int8")
    judged = evaluate(
        rounded.output, text=str(tmp_path / "other.txt"), sequence_length=512, windows=2
    )
    lines = ended.out.splitlines()
    assert any("perplexity" in line and f"{judged.perplexity:.2f}" in line for line in lines)
    assert any("weight files" in line and binary_size(rounded.file_bytes) in line for line in lines)


def test_a_demo_replaces_only_what_a_demo_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secateur: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "mine")
    ended = secateur("demo", "--output", "mine")
    assert (ended.code, "exists" in ended.err) == (2, True)
    assert (model / "model.safetensors").is_file()
