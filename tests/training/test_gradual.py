"""Pruning while training: when, how much, and that the optimizer follows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from zoo import matrices, tiny_model, tiny_windows, weight_of

from secateur.recipes.train import GradualOptions
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.training.gradual import Criterion, GradualPruning
from secateur.training.masks import open_masks

WINDOWS = tiny_windows(samples=3)
PLAIN = Criterion()


def train_gradually(
    model, schedule, criterion=PLAIN, steps=20, optimizer=torch.optim.Adam, **options
):
    """A loop that holds masks as the library's does; the masks after every step."""
    masks = open_masks(model)
    how = GradualOptions(**options)
    hook, history = GradualPruning(masks, schedule, criterion, how), []
    stepping = optimizer(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
        stepping.step()
        stepping.zero_grad()
        hook.on_step(step, steps, model, stepping)
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            assert not parameter[~mask].any()
            for moment in stepping.state[parameter].values():
                if torch.is_tensor(moment) and moment.shape == mask.shape:
                    assert not moment[~mask].any()
        history.append({name: mask.clone() for name, mask in masks.items()})
    return history


def sparsities(history):
    return [sum(int((~m).sum()) for m in masks.values()) for masks in history]


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in schedules), ("gpt2", "cubic")]
)
def test_sparsity_follows_the_schedule(family, name):
    model = tiny_model(family)
    schedule = schedules[name](0.8)
    history = train_gradually(model, schedule, every=4, begin=0.1, end=0.75)
    sizes = [m.numel() for m in history[0].values()]
    expected, now = [], 0.0
    for step in range(1, 21):
        if step in (6, 10, 14, 15):  # every 4 after step 2, and the end at 15
            now = schedule((step - 2) / 13)
        expected.append(sum(round(now * size) for size in sizes))
    assert sparsities(history) == pytest.approx(expected, abs=len(sizes))
    assert sparsities(history)[-1] == sum(round(0.8 * size) for size in sizes)
    for before, after in pairwise(history):
        assert not any(bool((after[n] & ~before[n]).any()) for n in after)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.2, 0.9), (1, 1)])
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_the_end_is_always_reached_once(steps, begin, end, every):
    options = GradualOptions(every=every, begin=begin, end=end)
    how = GradualPruning({}, schedules["cubic"](0.5), options=options)
    due = [how.due(step, steps) for step in range(1, steps + 1)]
    densities = [d for d in due if d is not None]
    assert densities.count(1.0) == 1
    assert densities[-1] == 1.0
    assert densities == sorted(densities)
    assert all(0 < d <= 1 for d in densities)


def test_scores_with_statistics_and_n_of_m():
    criterion = Criterion(scores["wanda"](), parse_pattern("2:4"), WINDOWS)
    history = train_gradually(tiny_model("llama"), schedules["cubic"](0.5), criterion, every=2)
    for mask in history[-1].values():
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert len(set(sparsities(history))) == 3  # 4:4, 3:4, 2:4


def test_regrowth_brings_weights_back_and_costs_none():
    criterion = Criterion(windows=WINDOWS)
    history = train_gradually(
        tiny_model("llama"), schedules["cubic"](0.8), criterion, every=2, regrowth=0.3
    )
    plain = train_gradually(tiny_model("llama"), schedules["cubic"](0.8), every=2)
    assert sparsities(history) == sparsities(plain)
    came_back = [
        sum(int((after[n] & ~before[n]).sum()) for n in after)
        for before, after in pairwise(history)
    ]
    assert came_back[2] > 0
    assert came_back[14:] == [0] * 5  # not at the last renewal, step 15, nor after it
    how = GradualPruning({}, schedules["cubic"](0.8), options=GradualOptions(regrowth=0.3))
    assert (how.exchanged(0.0), how.exchanged(1.0)) == (0.3, 0.0)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        torch.optim.Adagrad,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    ],
)
def test_any_optimizer_forgets_what_is_pruned(optimizer):
    train_gradually(tiny_model("llama"), schedules["cubic"](0.6), optimizer=optimizer, every=3)


def test_open_masks_know_what_is_pruned_already():
    model = tiny_model("gpt2")
    first = next(iter(matrices(model).values()))
    weight_of(first)[0, :7] = 0.0
    masks = open_masks(model)
    assert sum(int((~m).sum()) for m in masks.values()) == 7
    assert masks.keys() == {f"{name}.weight" for name in matrices(model)}


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"begin": 0.8, "end": 0.5}, {"end": 1.5}, {"regrowth": 1.0}]
)
def test_refuses_what_cannot_be(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        GradualOptions(**options)
