"""Adapters and gradual pruning, from a recipe to the files that are left."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import source_text
from trainings import assert_same, make_place, matrices, stopped_at, tensors, train_in

import secateur
from secateur.cli import main
from secateur.errors import PatternError, RecipeError

OPTIONS: dict[str, Any] = {"steps": 12, "learning_rate": 5e-3, "validations": 2, "save_minutes": 0}


train = partial(train_in, **OPTIONS)
GRADUAL = {"sparsity": 0.8, "every": 2}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training begins with, and one that nobody stopped."""
    place = make_place(tmp_path_factory.mktemp("adapting"), sparsity=0.5)
    train(place, place / "straight", gradual=GRADUAL)
    return place


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are different."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {n for n in old if not torch.equal(old[n], new[n])}


def test_adapters_are_merged_and_the_zeros_stay(places: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "targets": ["q_proj", "*.down_proj"]}
    done = train(places, tmp_path / "out", lora=lora, validation_windows=8)
    assert done.perplexity_after < done.perplexity_before
    assert done.sparsity == pytest.approx(0.5)
    before, after = matrices(places / "pruned"), matrices(tmp_path / "out")
    assert all(not after[n][before[n] == 0].any() for n in before)
    moved = changed(places / "pruned", tmp_path / "out")
    assert moved == {n for n in before if "q_proj" in n or "down_proj" in n}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list((tmp_path / "out").glob("adapter*"))


def test_what_is_saved_is_what_was_watched(places: Path, tmp_path: Path) -> None:
    (tmp_path / "watched.txt").write_text(source_text(held_out=True)[:4_000])
    watched = tmp_path / "watched.txt"
    done = train(places, tmp_path / "out", lora=8, validation_text=str(watched))
    judged = secateur.evaluate(tmp_path / "out", text=watched, sequence_length=64, windows=16)
    assert judged.perplexity == pytest.approx(done.perplexity_after, rel=0.02)


def test_gradual_pruning_ends_at_its_sparsity(places: Path) -> None:
    done = train(places, places / "straight", gradual=GRADUAL, resume=True)  # only read
    assert done.sparsity == pytest.approx(0.8, abs=1e-3)
    before, after = matrices(places / "pruned"), matrices(places / "straight")
    assert all(not after[n][before[n] == 0].any() for n in before)
    assert "80%" in done.manifest.objective


@pytest.mark.parametrize(
    "gradual", ["2:4", {"pattern": "2:4", "score": "wanda", "windows": 2, "every": 4}]
)
def test_gradual_pruning_to_a_pattern(gradual: Any, places: Path, tmp_path: Path) -> None:
    done = train(places, tmp_path / "out", "dense", gradual=gradual)
    assert done.sparsity == pytest.approx(0.5)
    for weight in matrices(tmp_path / "out").values():
        groups = weight.view(len(weight), -1, 4)
        assert ((groups != 0).sum(-1) == 2).all()


def test_with_a_teacher_and_regrowth(places: Path, tmp_path: Path) -> None:
    gradual = {"sparsity": 0.7, "every": 2, "regrowth": 0.3, "windows": 4, "scope": "global"}
    done = train(places, tmp_path / "out", "dense", teacher=places / "dense", gradual=gradual)
    assert done.sparsity == pytest.approx(0.7, abs=1e-3)


def test_stopped_runs_go_on_to_the_same_files(places: Path, tmp_path: Path) -> None:
    lora = {"lora": 4, "steps": 8}
    train(places, tmp_path / "lora", **lora)
    for mode, straight in (({"gradual": GRADUAL}, places / "straight"), (lora, tmp_path / "lora")):
        out = tmp_path / f"{straight.name} stopped"
        with stopped_at(5):
            train(places, out, **mode)
        train(places, out, resume=True, **mode)
        assert_same(straight, out)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lora": 4, "gradual": 0.8}, "lora with gradual"),
        ({"lora": 4, "rates": {"*embed*": 0.0}}, "rates"),
        ({"lora": {"targets": ["nowhere"]}}, "no linear"),
        ({"lora": {"targets": ["q_proj", "nowhere"]}}, "nowhere"),
        ({"lora": 0}, "lora=0"),
        ({"lora_targets": ["q_proj"], "gradual": 0.8}, "lora with gradual"),
        ({"gradual": {"every": 2}}, "gradual"),
        ({"gradual": {"pattern": "1:4", "sparsity": 0.5}}, "0.75, not 0.5"),
        ({"gradual": 0.3}, "50.0%"),
        ({"gradual": {"sparsity": 0.8, "schedule": "cubick"}}, "cubic"),
        ({"gradual": 0.8, "steps": None, "minutes": 1.0}, "steps"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], what: str, places: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=what):
        train(places, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_is_none(places: Path, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="lots"):
        train(places, tmp_path / "out", gradual="lots")


def test_by_the_command_line(
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*words: object) -> Any:
        common = ["--text", places / "text.txt", "--steps", 8, "--json"]
        monkeypatch.setattr(sys, "argv", ["secateur", "train", *map(str, [*words, *common])])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    pruned = places / "pruned"
    flags = "--lora-alpha 6 --lora 2 --lora-dropout 0.1 --lora-exclude o_proj,down_proj"
    record = command(pruned, "-o", tmp_path / "1", *flags.split())
    how = {"rank": 2, "alpha": 6.0, "dropout": 0.1, "targets": ["*"]}
    assert record["recipe"]["lora"] == {**how, "exclude": ["o_proj", "down_proj"]}
    moved = {name.split(".")[-2] for name in changed(pruned, tmp_path / "1")}
    assert moved == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    record = command(pruned, "-o", tmp_path / "2", "--gradual", 0.6, "--set", "gradual.every=2")
    assert record["recipe"]["gradual"]["every"] == 2
    assert record["result"]["decoder_sparsity"] == pytest.approx(0.6, abs=1e-3)
