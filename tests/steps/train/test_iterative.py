"""Iterative pruning and layer-wise learning rates, from a recipe to the files that are left."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import runner
from tiny import save_tiny
from trainings import make_place, matrices, tensors, train_in

from secateur.errors import RecipeError
from secateur.sparsity.schedules import schedules
from secateur.training import loop

OPTIONS: dict[str, Any] = {
    "steps": 6, "learning_rate": 5e-3, "validations": 2, "save_minutes": 0, "validation_windows": 4,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "none": {"rewind": "none"},
    "rate": {"rewind": "rate", "rewind_step": 1},
    "early": {"rewind": "weights", "rewind_step": 2},
    "start": {"rewind": "weights"},
}


train = partial(train_in, **OPTIONS)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("rounds"), torch.bfloat16, sparsity=0.3)


def bits(folder: Path) -> bytes:
    """The weights as they are stored."""
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_every_round_prunes_the_same_fraction_and_trains(
    mode: str, places: Path, tmp_path: Path
) -> None:
    how = {"sparsity": 0.8, "rounds": 3, **MODES[mode]}
    done = train(places, tmp_path / "out", "dense", iterative=how)
    assert done.sparsity == pytest.approx(0.8, abs=1e-3)
    rounds = done.manifest.result["rounds"]
    assert [x["training"] for x in rounds][-3:] == ["round-1", "round-2", "round-3"]
    schedule = schedules["geometric"](0.8)
    assert [x["sparsity"] for x in rounds][-3:] == [schedule(i / 3) for i in (1, 2, 3)]
    each = 6 - how.get("rewind_step", 0)
    first = [6] if how["rewind"] == "weights" else []
    assert [x["steps"] for x in rounds] == [*first, each, each, each]
    assert done.steps == sum(x["steps"] for x in rounds)
    assert done.tokens == sum(x["tokens"] for x in rounds)
    assert len(json.loads((tmp_path / "out/secateur/training.json").read_text())) == 1
    assert done.perplexity_before is not None


def test_weights_go_back_to_their_early_values(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, dict[str, torch.Tensor]]] = []
    plain = loop.Loop.begin

    def begin(self: loop.Loop) -> None:
        plain(self)
        now = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        begun.append((self.plan.first_step, now))

    monkeypatch.setattr(loop.Loop, "begin", begin)
    stopped = loop.Loop.step
    after_two: dict[str, torch.Tensor] = {}

    def step(self: loop.Loop) -> None:
        stopped(self)
        if self.outcome.step == 2 and not after_two:
            after_two.update({n: p.detach().clone() for n, p in self.model.named_parameters()})

    monkeypatch.setattr(loop.Loop, "step", step)
    how = {"sparsity": 0.8, "rounds": 2, "rewind": "weights", "rewind_step": 2}
    train(places, tmp_path / "out", "dense", iterative=how)
    assert [first for first, _ in begun] == [0, 2, 2]
    for _, weights in begun[1:]:
        for name, value in weights.items():
            assert torch.equal(value, after_two[name] * (value != 0)), name


def test_the_rate_falls_once_over_all_rounds_where_nothing_goes_back(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    plain = loop.Loop.run

    def run(self: Any) -> Any:
        outcome = plain(self)
        rates.append([line["learning_rate"] for line in outcome.log])
        return outcome

    monkeypatch.setattr(loop.Loop, "run", run)
    for rewind in ("none", "rate"):
        how = {"sparsity": 0.5, "rounds": 2, "rewind": rewind}
        train(places, tmp_path / rewind, "dense", iterative=how, warm_up=0.0)
    none_first, none_second, first, second = rates
    assert none_second[0] < none_first[-1]
    assert first == second


TICKET = {"sparsity": 0.8, "rounds": 2, "rewind": "weights", "rewind_step": 1, "score": "wanda"}
STOPPED: dict[str, Any] = {"iterative": TICKET, "steps": 3}


@pytest.fixture(scope="module")
def straight(places: Path) -> Any:
    """A run that nobody stopped."""
    return train(places, places / "straight", "dense", **STOPPED)


@pytest.mark.parametrize(("at", "most"), [(2, 7), (9, 4), (17, 3)])
def test_a_stopped_run_resumes_to_the_same_bits(
    at: int, most: int, straight: Any, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the training before the rounds, in the first and in the second."""
    kill_at_file(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        train(places, tmp_path / "out", "dense", **STOPPED)
    monkeypatch.undo()
    steps, plain = [], loop.Loop.step

    def step(self: loop.Loop) -> None:
        steps.append(self.outcome.step)
        plain(self)

    monkeypatch.setattr(loop.Loop, "step", step)
    resumed = train(places, tmp_path / "out", "dense", resume=True, **STOPPED)
    assert 0 < len(steps) <= most
    assert bits(places / "straight") == bits(tmp_path / "out")
    for name in ("step", "tokens", "perplexities", "rounds", "best_step"):
        assert resumed.manifest.result[name] == straight.manifest.result[name]


def kill_at_file(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop after so many files of weights and reports have got their names."""
    left, plain = [at], Path.replace

    def replace(self: Path, target: Any) -> Path:
        made = plain(self, target)
        if "rounds" in str(target):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        return made

    monkeypatch.setattr(Path, "replace", replace)


def test_rounds_to_a_pattern(places: Path, tmp_path: Path) -> None:
    how = {"pattern": "2:4", "score": "wanda", "windows": 2, "rounds": 2}
    train(places, tmp_path / "out", "dense", iterative=how)
    for weight in matrices(tmp_path / "out").values():
        assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) == 2).all()


def test_zeros_of_the_model_stay(places: Path, tmp_path: Path) -> None:
    done = train(places, tmp_path / "out", iterative={"sparsity": 0.6, "rounds": 2})
    assert done.sparsity == pytest.approx(0.6, abs=1e-3)
    before, after = matrices(places / "pruned"), matrices(tmp_path / "out")
    assert all(not after[n][before[n] == 0].any() for n in before)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"iterative": 0.8, "gradual": 0.8}, "gradual with iterative"),
        ({"iterative": 0.8, "lora": 4}, "lora with iterative"),
        ({"iterative": {"rounds": 2}}, "iterative="),
        ({"iterative": {"sparsity": 0.8, "rewind_step": 6}}, "6 steps"),
        ({"iterative": {"sparsity": 0.8, "rewind": "none", "rewind_step": 1}}, "rewind=none"),
        ({"iterative": {"sparsity": 0.8, "rewind": "weight"}}, "weights"),
        ({"iterative": 0.8, "steps": None, "minutes": 1.0}, "steps"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], what: str, places: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=what):
        train(places, tmp_path / "out", "dense", **options)
    assert not (tmp_path / "out").exists()


def test_layers_learn_at_rates_of_their_own(places: Path, tmp_path: Path) -> None:
    """Plain SGD without momentum: one step moves each layer by its rate times the gradient."""
    options: dict[str, Any] = {
        "steps": 1, "optimizer": "SGD", "optimizer_options": {"momentum": 0.0}, "warm_up": 0.0,
        "clip": 0.0, "learning_rate": 0.5, "validation_windows": 0,
    }  # fmt: skip
    save_tiny(places / "full", dtype=torch.float32, num_hidden_layers=3)
    train(places, tmp_path / "plain", "full", **options)
    rates = {"model.layers.*": 0.5, "model.layers.1.*": 0.0}  # the last match counts
    train(places, tmp_path / "mixed", "full", **options, rates=rates)
    start, plain, mixed = (
        tensors(x) for x in (places / "full", tmp_path / "plain", tmp_path / "mixed")
    )
    for name in start:
        factor = 0.0 if ".layers.1." in name else 0.5 if ".layers." in name else 1.0
        moved = plain[name] - start[name]
        torch.testing.assert_close(mixed[name] - start[name], factor * moved, atol=1e-6, rtol=0)


def test_by_the_command_line(
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = runner(monkeypatch, capsys)
    ended = command(
        "train", places / "dense", "-o", tmp_path / "out", "--iterative", 0.6, "--steps", 4,
        "--text", places / "text.txt", "--set", "iterative.rounds=2",
        "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    assert record["recipe"]["iterative"]["rounds"] == 2
    assert record["result"]["decoder_sparsity"] == pytest.approx(0.6, abs=1e-3)
