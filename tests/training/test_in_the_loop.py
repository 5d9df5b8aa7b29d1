"""Gradual pruning and adapters in the library's own training loop."""

from __future__ import annotations

import torch
from learning import watched
from zoo import tiny_model, tiny_windows, zeros_of

from secateur.recipes.train import GradualOptions
from secateur.sparsity.schedules import schedules
from secateur.training.batches import Batches
from secateur.training.gradual import Criterion, GradualPruning
from secateur.training.loop import Loop, TrainingTask
from secateur.training.lora import ADAPTERS_ALONE, attach, merge
from secateur.training.masks import Masks, open_masks
from secateur.training.objectives import next_token
from secateur.training.training_plan import TrainingPlan

WINDOWS = tiny_windows(samples=6)
BATCHES = Batches(WINDOWS, size=3, seed=1)


def plan(steps=12, **options):
    options = {"learning_rate": 3e-3, "fast_matmuls": False, "validations": 2, **options}
    return TrainingPlan(steps=steps, **options)


def zeros(kept):
    return sum(int((~mask).sum()) for mask in kept.values())


def test_gradual_pruning_ends_with_its_masks_held():
    model = tiny_model("llama")
    masks = Masks(open_masks(model))
    how = GradualOptions(every=2, regrowth=0.2)
    hook = GradualPruning(masks.kept, schedules["cubic"](0.7), Criterion(windows=WINDOWS), how)
    objective = next_token(model)
    task = TrainingTask(model, BATCHES, objective, masks, watched(WINDOWS), [hook])
    outcome = Loop(task, plan()).run()
    masks.check(model)
    assert zeros(masks.kept) == sum(round(0.7 * m.numel()) for m in masks.kept.values())
    assert outcome.best_step is not None
    assert outcome.best_step >= 9  # not of the time when more was kept


def test_adapters_are_trained_alone():
    model = tiny_model("llama")
    masks = open_masks(model)
    Masks(Criterion().masks(model, masks, 0.6)).apply(model)
    before = zeros_of(model)
    adapted = attach(model)
    inner = adapted.get_base_model()
    frozen = {n: p.detach().clone() for n, p in inner.named_parameters() if ".lora_" not in n}
    objective = next_token(inner)
    task = TrainingTask(inner, BATCHES, objective)
    outcome = Loop(task, plan(rates=ADAPTERS_ALONE)).run()
    assert outcome.log[-1]["loss"] < outcome.log[0]["loss"]
    assert all(torch.equal(inner.get_parameter(n), p) for n, p in frozen.items())
    with torch.no_grad():
        function = inner(input_ids=WINDOWS).logits
        merged = merge(adapted)
        torch.testing.assert_close(merged(input_ids=WINDOWS).logits, function, rtol=1e-4, atol=1e-4)
    assert all(bool((zeros_of(merged)[name] | ~gone).all()) for name, gone in before.items())
