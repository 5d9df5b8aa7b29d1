"""Rounds: what chooses the weights, where a training begins, what a second call resumes."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from safetensors.torch import save_file
from zoo import tiny_model, tiny_windows

from secateur.errors import RecipeError, VerificationError
from secateur.recipes.train import IterativeOptions
from secateur.sparsity.schedules import levels, schedules
from secateur.training.batches import Batches
from secateur.training.gradual import Criterion, Rounds
from secateur.training.loop import Outcome, TrainingTask
from secateur.training.masks import open_masks
from secateur.training.training_plan import TrainingPlan

PLAN, BATCHES = TrainingPlan(steps=50), Batches(tiny_windows(7), 2)


class Disturbance:
    """Stands in for loops: moves the kept weights a little, and saves them as a loop does."""

    def __init__(self, model, kept, held=True):
        self.model, self.kept, self.held = model, kept, held
        self.names, self.found, self.read = [], [], []

    def __call__(self, task, plan, saved=None, label=""):
        self.plan, self.saved, self.hooks = plan, saved, task.hooks
        self.read += [task.batches.numbers(plan.first_step)] if saved else []
        return self

    def validation_loss(self):
        return 5.0

    def run(self):
        self.names.append(self.saved.name)
        self.found.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        for hook in self.hooks:
            hook.on_step(self.plan.steps - 1, self.plan.steps, self.model, None)
        random = torch.Generator().manual_seed(zlib.crc32(self.saved.name.encode()))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                moved = parameter + 0.2 * torch.randn(parameter.shape, generator=random)
                parameter.copy_(moved * self.kept.get(name, True) if self.held else moved)
        save_file(dict(self.model.named_parameters()), self.saved / "final.safetensors")
        last = self.plan.last_step or self.plan.steps
        return Outcome(step=last, tokens=10, validations=[(last, 4.0)], best_loss=4.0)


def rounds_of(model, folder, sparsity=0.8, **how):
    task, options = TrainingTask(model, BATCHES, None), IterativeOptions(**how)
    schedule = schedules["geometric"](sparsity)
    return Rounds(open_masks(model), schedule, Criterion(), options, folder, task)


def in_rounds(folder, family="llama", **how):
    rounds = rounds_of(tiny_model(family), folder, rounds=how.pop("rounds", 3), **how)
    loops = Disturbance(rounds.task.model, rounds.kept)
    outcome = rounds.train(loops, PLAN)
    records = outcome.rounds
    assert outcome.folder == folder / loops.names[-1]
    assert [x["training"] for x in records][-len(loops.names) :] == loops.names
    assert outcome.step == sum(x["steps"] for x in records)
    assert outcome.tokens == 10 * len(records)
    assert outcome.validations[0] == (0, 5.0)
    return rounds, loops, records


def smallest(weights, kept, sparsity):
    """The mask by magnitude among the kept, one matrix, by sorting."""
    flat = weights.abs().flatten().masked_fill(~kept.flatten(), -1.0)
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    return mask.view_as(weights)


@pytest.mark.parametrize("step", [0, 49])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_go_back_and_masks_come_from_trained_weights(family, step, tmp_path):
    rounds, loops, records = in_rounds(tmp_path, family, rewind="weights", rewind_step=step)
    start = dict(tiny_model(family).named_parameters())
    masks = open_masks(tiny_model(family))
    assert loops.names == ["dense", "round-1", "round-2", "round-3"]
    assert loops.read[1:] == [BATCHES.numbers(step)] * 3
    assert [x["sparsity"] for x in records[1:]] == list(levels(schedules["geometric"](0.8), 3))
    for number, found in enumerate(loops.found[1:]):
        twin = copy.deepcopy(rounds.task.model)
        for name, parameter in twin.named_parameters():
            parameter.data.copy_(loops.found[number][name])
        again = Disturbance(twin, masks)
        again(rounds.task, PLAN, tmp_path / loops.names[number]).run()
        weights = dict(twin.named_parameters())
        level = records[number + 1]["sparsity"]
        masks = {n: smallest(weights[n].detach(), masks[n], level) for n in masks}
        for name, value in start.items():
            assert torch.equal(found[name], value * masks.get(name, True))
    for name, mask in masks.items():
        assert torch.equal(rounds.kept[name], mask)
        assert int((~mask).sum()) == round(0.8 * mask.numel())


@pytest.mark.parametrize("rewind", ["rate", "none"])
def test_weights_go_on(rewind, tmp_path):
    _, loops, _ = in_rounds(tmp_path, rewind=rewind)
    assert loops.read == [BATCHES.numbers(step) for step in (0, 50, 100)]  # and the text too
    dense = dict(tiny_model("llama").named_parameters())
    for name, found in loops.found[0].items():
        assert bool(((found == dense[name]) | (found == 0)).all())


@pytest.mark.parametrize(
    ("how", "spans"),
    [
        ({"rewind": "none"}, [(0, 10, 30), (10, 20, 30), (20, 30, 30)]),
        ({"rewind": "rate"}, [(0, 0, 10)] * 3),
        ({"rewind": "rate", "rewind_step": 7}, [(7, 0, 10)] * 3),
        ({"rewind": "weights", "rewind_step": 4}, [(4, 0, 10)] * 3),
    ],
)
def test_the_steps_of_each_round(how, spans, tmp_path):
    rounds = rounds_of(tiny_model("llama"), tmp_path, rounds=3, **how)
    parts = [rounds.part(number, TrainingPlan(steps=10)) for number in (1, 2, 3)]
    assert [(x.first_step, x.last_step, x.steps) for x in parts] == spans
    begins = {"none": 20, "rate": 20 - how.get("rewind_step", 0), "weights": 4}[how["rewind"]]
    batches = rounds.batches(2, TrainingPlan(steps=10))
    assert batches.numbers(parts[2].first_step) == BATCHES.numbers(begins)


@pytest.mark.parametrize("plan", [{"steps": 4}, {"minutes": 1.0}])
def test_refuses_to_go_back_behind_the_end(plan, tmp_path):
    with pytest.raises(RecipeError, match="rewind_step"):
        rounds_of(tiny_model("llama"), tmp_path, rewind_step=4).part(1, TrainingPlan(**plan))


@pytest.mark.parametrize("rewind", ["rate", "weights"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_second_call_resumes(stop, rewind, tmp_path, monkeypatch):
    whole, _, _ = in_rounds(tmp_path / "whole", rewind=rewind)
    plain = Disturbance.run

    def stopping(loops):
        done = plain(loops)
        if loops.saved.name == f"round-{stop}":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Disturbance, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        in_rounds(tmp_path / "stopped", rewind=rewind)
    monkeypatch.setattr(Disturbance, "run", plain)
    again, loops, _ = in_rounds(tmp_path / "stopped", rewind=rewind)
    assert loops.names == [f"round-{n}" for n in range(stop, 4)]
    for name, parameter in whole.task.model.named_parameters():
        assert torch.equal(parameter, again.task.model.get_parameter(name))
    assert all(torch.equal(whole.kept[name], again.kept[name]) for name in whole.kept)
    left = sorted(x.relative_to(tmp_path).as_posix() for x in tmp_path.glob("stopped/*/*.safe*"))
    assert left == [f"stopped/round-3/{x}.safetensors" for x in ("final", "masks")]


def test_a_training_that_fills_zeros_is_found(tmp_path):
    rounds = rounds_of(tiny_model("llama"), tmp_path, rounds=2)
    with pytest.raises(VerificationError) as raised:
        rounds.train(Disturbance(rounds.task.model, rounds.kept, held=False), PLAN)
    assert next(iter(rounds.kept)) in str(raised.value)
