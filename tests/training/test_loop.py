"""The loop: zeros at every step, parts of steps, schedules, what is watched, what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import EXACT, SEQUENCES, batches, pruned_model, train, watched, weights, zeros
from pydantic import ValidationError
from safetensors import safe_open

from secateur.errors import NumericalError, RecipeError, SourceError, VerificationError
from secateur.training.batches import Batch
from secateur.training.loop import Outcome
from secateur.training.masks import FIXED_AT_ZERO, Masks, stored_masks
from secateur.training.objectives import next_token
from secateur.training.training_plan import TrainingPlan, optimizers

TOLERANCE = 2e-5


def run(model: Any, how: TrainingPlan, size: int = 4, **options: Any) -> Outcome:
    """Plain training with the zeros of the model held."""
    masks = options.pop("masks", None) or Masks.of(model)
    objective = options.pop("objective", None) or next_token(model)
    return train(model, batches(size), objective, masks, how, **options)


class Watching:
    """A hook that looks at zeros after every step."""

    def __init__(self, where: dict[str, torch.Tensor]) -> None:
        self.where, self.steps = where, 0

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        self.steps += 1
        for name, gone in self.where.items():
            parameter = model.get_parameter(name)
            assert not parameter[gone].any()
            for moment in optimizer.state[parameter].values():
                if isinstance(moment, torch.Tensor) and moment.shape == gone.shape:
                    assert not moment[gone].any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"weight_decay": 0.1}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_zeros_stay_for_a_hundred_steps(name: str, options: dict[str, Any]) -> None:
    model = pruned_model()
    gone = zeros(model)
    watching = Watching(gone)
    how = TrainingPlan(steps=100, optimizer=name, optimizer_options=options, **EXACT)
    done = run(model, how, hooks=[watching])
    assert watching.steps == 100
    assert done.log[-1]["loss"] < 0.8 * done.log[0]["loss"]
    assert all(torch.equal(gone[n], gone[n] & now) for n, now in zeros(model).items())
    assert all((model.get_parameter(n)[~gone[n]] != 0).float().mean() > 0.99 for n in gone)


@pytest.mark.parametrize("name", sorted(x.__name__ for x in optimizers().values()))
def test_zeros_stay_with_every_optimizer_of_torch(name: str) -> None:
    model = pruned_model()
    rates = {"*": 0.0, "*proj.weight": 1.0}  # Muon takes matrices only
    how = TrainingPlan(steps=4, optimizer=name, rates=rates, **EXACT)
    before = weights(model)
    run(model, how, hooks=[Watching(zeros(model))])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.endswith("proj.weight")}


def test_optimizers_that_are_trusted_leave_zeros_alone() -> None:
    for kind in FIXED_AT_ZERO:
        parameter = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
        optimizer = kind([parameter], lr=0.1, weight_decay=0.1)
        for _ in range(5):
            parameter.grad = torch.tensor([0.0, 0.3])
            optimizer.step()
        assert parameter[0] == 0
        assert parameter[1] != 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "gemma2"])
def test_families_learn_and_keep_their_zeros(family: str) -> None:
    model = pruned_model(family)
    gone = zeros(model)
    done = run(model, TrainingPlan(steps=12, **EXACT))
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    assert all(not (gone[n] & ~now).any() for n, now in zeros(model).items())


def test_a_step_may_be_done_in_parts_and_layers_twice() -> None:
    found = []
    for options in ({}, {"micro_batch": 1}, {"micro_batch": 3}, {"gradient_checkpointing": True}):
        model = pruned_model()
        # plain steps: Adam would make much of a difference in the last bit
        how = TrainingPlan(steps=5, optimizer="SGD", **EXACT, **options)  # type: ignore[arg-type]
        run(model, how)
        assert "forward" not in vars(model.model.layers[0])
        found.append(weights(model))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_bfloat16_model_is_trained_in_float32_and_given_back_as_it_was() -> None:
    model = pruned_model(dtype=torch.bfloat16)
    seen: list[torch.dtype] = []

    class Dtypes:
        def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
            seen.extend(p.dtype for p in model.parameters())

    gone = zeros(model)
    run(model, TrainingPlan(steps=2, learning_rate=5e-3), hooks=[Dtypes()])
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(not (gone[n] & ~now).any() for n, now in zeros(model).items())


def test_the_learning_rate_rises_and_falls() -> None:
    how = TrainingPlan(steps=100, warm_up=0.1)
    rates = [how.rate(step / 100, 0.01, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.09)))
    assert rates[50] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert max(rates[10:]) == rates[10]
    assert how.rate(0.5, 0.1, 3.0) == pytest.approx(1.5)


def test_the_default_rate_is_for_the_width_and_for_the_tokens_of_a_step() -> None:
    how = TrainingPlan(steps=1)
    assert how.peak(500, 2048) == how.peak(500, 10_000) == pytest.approx(0.25 / 500)
    assert how.peak(500, 512) == pytest.approx(0.25 / 500 / 2)
    assert TrainingPlan(steps=1, learning_rate=0.1).peak(500, 512) == 0.1


def test_minutes_end_a_run_in_time_and_the_rate_falls_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that goes on whenever it is read."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks))
    monkeypatch.setattr("secateur.training.loop.time", clock)
    model = pruned_model()
    done = run(model, TrainingPlan(minutes=1.5 / 60, **EXACT), validation=watched(SEQUENCES[:4]))
    assert done.stopped == "minutes"
    assert 1.3 < done.seconds < 1.6
    assert done.log[-1]["learning_rate"] < 0.2 * max(x["learning_rate"] for x in done.log)
    assert done.tokens == done.step * 4 * 12


def test_the_best_weights_are_kept() -> None:
    model = pruned_model()
    scrambled = SEQUENCES.flip(1)  # the better one is learned, the worse the other
    how = TrainingPlan(steps=40, validations=20, **EXACT)
    done = run(model, how, validation=watched(scrambled))
    losses = dict(done.validations)
    assert done.best_step is not None
    assert losses[done.best_step] == min(losses.values())
    assert len([s for s in losses if s > done.best_step]) > 2
    with torch.no_grad():
        after = next_token(model)(model, Batch(scrambled, ())).item()
    assert after == pytest.approx(min(losses.values()), abs=1e-5)


def test_training_can_begin_later_in_its_schedule() -> None:
    model = pruned_model()
    done = run(model, TrainingPlan(steps=10, first_step=7, **EXACT))
    assert [line["step"] for line in done.log] == [8, 9, 10]


# -- what goes wrong -----------------------------------------------------------------------------


class Failing:
    """A loss that goes wrong at some step."""

    def __init__(self, model: Any, step: int, factor: float) -> None:
        self.plain, self.step, self.factor, self.calls = next_token(model), step, factor, 0

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        self.calls += 1
        loss = self.plain(model, batch)
        return loss * self.factor if self.calls > self.step else loss


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_the_best_weights(
    factor: float, tmp_path: Path
) -> None:
    model = pruned_model()
    how = TrainingPlan(steps=20, validations=20, save_minutes=0, **EXACT)
    with pytest.raises(NumericalError, match=str(factor)):
        run(model, how, objective=Failing(model, 7, factor), validation=watched(SEQUENCES[:8]),
            saved=tmp_path)  # fmt: skip
    assert (tmp_path / "state.safetensors").exists()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with torch.no_grad():
        assert next_token(model)(model, Batch(SEQUENCES, ())).item() < math.log(96)


def test_a_diverging_loss_ends_the_run_and_what_was_saved_is_from_before(tmp_path: Path) -> None:
    model = pruned_model()
    how = TrainingPlan(steps=30, save_minutes=0, **EXACT)
    with pytest.raises(NumericalError, match="diverges"):
        run(model, how, objective=Failing(model, 15, 5.0), saved=tmp_path)
    with safe_open(tmp_path / "state.safetensors", framework="pt") as stored:
        assert json.loads(stored.metadata()["facts"])["step"] == 15
    model = pruned_model()
    done = run(model, how, saved=tmp_path)
    assert done.step == 30
    assert done.log[-1]["loss"] < done.log[14]["loss"]


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = pruned_model()
    name, mask = next(iter(Masks.of(model).kept.items()))
    with pytest.raises(RecipeError, match="nowhere"):
        run(model, TrainingPlan(steps=1), masks=Masks({"nowhere.weight": mask}))
    with pytest.raises(RecipeError, match=name):
        run(model, TrainingPlan(steps=1), masks=Masks({name: mask[1:]}))
    Masks({name: mask}).save(tmp_path / "m.safetensors")
    assert torch.equal(dict(stored_masks(tmp_path / "m.safetensors"))[name], mask)
    with pytest.raises(SourceError, match="file of masks"):
        dict(stored_masks(tmp_path / "no.safetensors"))
    with torch.no_grad():
        model.get_parameter(name)[~mask] = 1.0
    with pytest.raises(VerificationError, match=name):
        Masks({name: mask}).check(model)


def test_what_makes_no_sense_is_refused() -> None:
    model = pruned_model()
    with pytest.raises(RecipeError, match="rates"):
        run(model, TrainingPlan(steps=1, rates={"*": 0.0}))
    with pytest.raises(RecipeError, match="beta"):
        run(model, TrainingPlan(steps=1, optimizer_options={"beta": 1}))
    with pytest.raises(RecipeError, match="hooks"):
        run(model, TrainingPlan(minutes=1), hooks=[Watching({})])
    wrong: list[dict[str, Any]] = [
        {}, {"steps": 1, "minutes": 1}, {"steps": -1}, {"steps": 1, "learning_rate": 0.0},
        {"steps": 1, "warm_up": 1.0}, {"steps": 1, "clip": -1.0}, {"steps": 1, "micro_batch": 0},
        {"steps": 1, "optimizer": "AdamV"}, {"steps": 1, "optimizer": "LBFGS"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises((RecipeError, ValidationError)):
            TrainingPlan(**options)
