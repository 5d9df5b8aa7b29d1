"""Learned masks, from a recipe to a cut checkpoint with plain shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import MemoryBudgetError, RecipeError, SourceError
from secateur.structured import learned as learning
from secateur.structured.cut import sizes_of
from secateur.training import loop

HOW: dict[str, Any] = {"steps": 6, "batch": 2, "learning_rate": 1e-3}
KEEP: dict[str, Any] = {"keep_layers": 2, "ffn": 36, "kv_groups": 1, "hidden_size": 24}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So short a training saves at every step, and updates domains."""
    for name, value in {"SAVE_MINUTES": 0.0, "UPDATE_EVERY": 2, "HELD_OUT": 4}.items():
        monkeypatch.setattr(learning, name, value)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and two texts, as windows."""
    place = tmp_path_factory.mktemp("learned")
    tiny_model("llama").save_pretrained(place / "source")
    save_windows(tiny_windows(samples=16), place / "one.safetensors")
    save_windows(tiny_windows(samples=16, seed=2), place / "two.safetensors")
    return place


def cut(places: Path, output: Path, learned: dict[str, Any] | int = HOW, **options: Any) -> Any:
    """By the Python API."""
    values = {"calibration": places / "one.safetensors", **KEEP, **options}
    return secateur.structure(places / "source", output=output, learned=learned, **values)


def steps(output: Path) -> list[dict[str, Any]]:
    """The notes of the cut."""
    found: list[dict[str, Any]] = json.loads((output / "secateur" / "steps.json").read_text())
    return found


def test_every_kind_has_exactly_its_target_size(places: Path, tmp_path: Path) -> None:
    report = cut(places, tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 24)
    assert (config.intermediate_size, config.num_key_value_heads) == (36, 1)
    assert report.manifest.structure.varied is False
    (step,) = steps(tmp_path / "out")
    assert (step["step"], step["by"], step["steps"]) == ("learned", "learned masks", 6)
    assert len(step["cut"]["layers"]) == 2
    assert {len(units) for units in step["cut"]["neurons"].values()} == {36}


def test_the_cut_has_the_weights_that_were_trained(places: Path, tmp_path: Path) -> None:
    cut(places, tmp_path / "out", keep_layers=None, kv_groups=None, hidden_size=None)
    (step,) = steps(tmp_path / "out")
    before = load_file(places / "source" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    kept = before[name][step["cut"]["neurons"]["1"]]
    assert after[name].shape == kept.shape
    assert not torch.equal(after[name], kept)
    moved = (after[name] - kept).abs().max()
    assert moved < 6 * 1.1e-3  # Adam moves a weight by at most the rate in a step, about


def test_a_target_for_the_whole_decoder(places: Path, tmp_path: Path) -> None:
    cut(places, tmp_path / "out", keep_parameters=0.7, **dict.fromkeys(KEEP))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    sizes = sizes_of(model)
    assert len(set(sizes.groups)) == len(set(sizes.neurons)) == 1
    source = AutoModelForCausalLM.from_pretrained(places / "source")
    left, there = (
        sum(p.numel() for n, p in x.named_parameters() if ".layers." in n) for x in (model, source)
    )
    assert left / there == pytest.approx(0.7, abs=0.03)


def test_domains_are_loaded_by_their_losses(places: Path, tmp_path: Path) -> None:
    two = str(places / "two.safetensors")
    cut(places, tmp_path / "out", {**HOW, "domains": [two]})
    (step,) = steps(tmp_path / "out")
    one = str(places / "one.safetensors")
    for found in ("proportions", "losses", "references"):
        assert set(step[found]) == {one, two}
    assert sum(step["proportions"].values()) == pytest.approx(1)


@pytest.mark.parametrize("at", [3, 6])
def test_a_stopped_run_resumes_to_the_same_bits(
    at: int, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**HOW, "domains": [str(places / "two.safetensors")]}
    straight = cut(places, tmp_path / "straight", how)
    plain = loop.Loop.step

    def step(self: loop.Loop) -> None:
        plain(self)
        if self.outcome.step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "step", step)
    with pytest.raises(KeyboardInterrupt):
        cut(places, tmp_path / "out", how)
    monkeypatch.setattr(loop.Loop, "step", plain)
    resumed = cut(places, tmp_path / "out", how, resume=True)
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("straight", "out"))
    assert one == other
    assert steps(tmp_path / "straight") == steps(tmp_path / "out")
    assert resumed.manifest.cost.resumed
    assert not straight.manifest.cost.resumed


def test_a_number_alone_is_the_steps(places: Path, tmp_path: Path) -> None:
    report = cut(places, tmp_path / "out", 2, ffn=24, **{k: None for k in KEEP if k != "ffn"})
    assert report.manifest.structure.steps[0]["by"] == "learned masks"
    assert steps(tmp_path / "out")[0]["steps"] == 2


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"score": "wanda"}, RecipeError, "learned with score"),
        ({"effort": "best"}, RecipeError, "learned with effort"),
        ({"whole_first": 1}, RecipeError, "learned with whole_first"),
        ({"memory": {"max_memory": "1MiB"}}, MemoryBudgetError, "training"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], error: type[Exception], what: str, places: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=what):
        cut(places, tmp_path / "out", **options)


@pytest.mark.parametrize(("samples", "length"), [(4, 20), (16, 10)])
def test_domains_that_do_not_fit_are_refused(
    samples: int, length: int, places: Path, tmp_path: Path
) -> None:
    file = tmp_path / "odd.safetensors"
    save_windows(tiny_windows(samples=samples, length=length), file)
    with pytest.raises(SourceError, match=f"{samples} windows of {length}") as raised:
        cut(places, tmp_path / "out", {**HOW, "domains": [str(file)]})
    assert raised.value.where == str(file)
