"""`secateur methods` names every method that trains, with a command that works."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from commands import runner
from tiny import save_tiny
from trained import source_text

from secateur.training.methods import training_methods


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    place = tmp_path_factory.mktemp("methods")
    save_tiny(place / "model")
    (place / "text.txt").write_text(source_text()[:30_000])
    return place


def test_the_table_and_json_name_them_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = runner(monkeypatch, capsys)
    record = json.loads(command("methods", "--json").out)
    assert set(record["training"]) == set(training_methods)
    shown = command("methods").out.replace("\n", "")
    assert "methods that train" in shown
    assert all(name in shown for name in ("iterative", "gradual", "distillation"))


@pytest.mark.parametrize("name", training_methods)
def test_the_command_of_each_works(
    name: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a tiny model, with one or two steps in place of a real budget."""
    verb, model, *words = shlex.split(training_methods[name].command)[1:]
    assert model in ("MODEL", "PRUNED")
    words = [word.replace("DENSE", str(places / "model")) for word in words]
    for flag, value in {"--minutes": 0.01, "--steps": 4}.items():
        if flag in words:
            words[words.index(flag) + 1] = str(value)
    small: list[Any] = ["--sequence-length", 32]
    small += ["--text", places / "text.txt", "--set", "validation_windows=0"]
    small += ["--set", "iterative.rewind_step=2"] if name == "lottery-ticket" else []
    command = runner(monkeypatch, capsys)
    ended = command(verb, places / "model", "-o", tmp_path / "out", *words, *small, "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    if "gradual" in words[0] or "iterative" in words[0]:
        assert record["result"]["decoder_sparsity"] == pytest.approx(0.8, abs=1e-3)
