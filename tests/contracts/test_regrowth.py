"""No pattern ever brings a pruned weight back, unless weights are exchanged on purpose."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from safetensors.torch import save_file
from zoo import tiny_windows

from contracts.pattern_examples import ALL, fitting_shape, parsed, sparsities
from secateur.recipes.train import GradualOptions, IterativeOptions
from secateur.sparsity.patterns.n_of_m import NOfM
from secateur.sparsity.schedules import schedules
from secateur.training.batches import Batches
from secateur.training.gradual import Criterion, GradualPruning, Rounds, exchange
from secateur.training.loop import Outcome, TrainingTask
from secateur.training.masks import open_masks
from secateur.training.training_plan import TrainingPlan

EXCHANGEABLE = [one for one in ALL if not isinstance(parsed(*one), NOfM)]  # N:M is refused


def model_for(text):
    """A model of one layer, all of whose matrices the pattern tiles."""
    torch.manual_seed(0)
    side = 80 if text == "3:5" else 96
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=side,
        intermediate_size=side,
        num_hidden_layers=1,
        num_attention_heads=side // 16,
        num_key_value_heads=side // 16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def move(model, masks, seed):
    """What a step of training does to the weights that are kept."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.add_(0.02 * torch.randn(weight.shape, generator=random) * mask)


def came_back(before, after) -> int:
    return sum(int((after[name] & ~before[name]).sum()) for name in after)


def zeros(masks) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def zero_weights(model, masks) -> dict[str, int]:
    return {name: int((model.get_parameter(name) == 0).sum()) for name in masks}


def promised(pattern, model, masks, sparsity) -> dict[str, int]:
    return {n: pattern.pruned(tuple(model.get_parameter(n).shape), sparsity) for n in masks}


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_a_mask_lies_within_what_is_allowed(text, scope):
    pattern, shape = parsed(text, scope), fitting_shape(text)
    random = torch.Generator().manual_seed(2)
    score = torch.randn(shape, generator=random)  # of both signs
    for sparsity in sparsities(pattern):
        for density in (0.0, 0.3, 0.98):
            allowed = torch.rand(shape, generator=random) < density
            before = allowed.clone()
            mask = pattern.mask(score, sparsity, allowed=allowed)
            assert not bool((mask & ~allowed).any())
            assert int((~mask).sum()) >= pattern.pruned(shape, sparsity)
            assert torch.equal(allowed, before)
        everything = torch.ones(shape, dtype=torch.bool)
        plain = pattern.mask(score, sparsity)
        assert torch.equal(pattern.mask(score, sparsity, allowed=everything), plain)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_the_next_mask_of_a_mask_is_exact_whatever_the_scores_of_the_pruned(text, scope):
    pattern, shape = parsed(text, scope), fitting_shape(text)
    random = torch.Generator().manual_seed(3)
    wanted = sparsities(pattern)
    for first, second in pairwise(wanted if len(wanted) > 1 else wanted * 2):
        kept = pattern.mask(torch.rand(shape, generator=random), first)
        score = torch.rand(shape, generator=random)
        for ruled_out in (1e6, -1e6, float("inf"), float("nan")):
            mask = pattern.mask(score.masked_fill(~kept, ruled_out), second, allowed=kept)
            assert not bool((mask & ~kept).any())
            assert int((~mask).sum()) == pattern.pruned(shape, second)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_gradual_pruning(text, scope):
    pattern, model = parsed(text, scope), model_for(text)
    goal = 0.5 if pattern.sparsity is None else pattern.sparsity
    masks = open_masks(model)
    hook = GradualPruning(
        masks, schedules["cubic"](goal), Criterion(pattern=pattern), GradualOptions(every=2)
    )
    history = []
    for step in range(1, 9):
        move(model, masks, step)
        hook.on_step(step, 8, model, None)
        history.append({name: mask.clone() for name, mask in masks.items()})
        assert zero_weights(model, masks) == zeros(masks)
    assert all(came_back(before, after) == 0 for before, after in pairwise(history))
    if scope == "global":
        total = sum(mask.numel() for mask in masks.values())
        step = pattern.step((96, 96))
        assert abs(sum(zeros(masks).values()) - goal * total) < step
    else:
        assert zeros(masks) == promised(pattern, model, masks, goal)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_pruning_in_rounds(text, scope, tmp_path):
    pattern, model = parsed(text, scope), model_for(text)
    goal = 0.5 if pattern.sparsity is None else pattern.sparsity
    masks = open_masks(model)
    history = []

    class Loops:
        """Stand in for loops: they move the kept weights, and save them."""

        def __call__(self, task, plan, saved=None, label=""):
            self.saved = saved
            return self

        def validation_loss(self):
            return None

        def run(self):
            assert zero_weights(model, masks) == zeros(masks)
            history.append({name: mask.clone() for name, mask in masks.items()})
            move(model, masks, len(history))
            save_file(dict(model.named_parameters()), self.saved / "final.safetensors")
            return Outcome(step=2)

    criterion, how = Criterion(pattern=pattern), IterativeOptions(rounds=3)
    task = TrainingTask(model, Batches(tiny_windows(2), 2), None)
    rounds = Rounds(masks, schedules["geometric"](goal), criterion, how, tmp_path, task)
    rounds.train(Loops(), TrainingPlan(steps=2))
    assert len(history) == 3
    assert all(came_back(before, after) == 0 for before, after in pairwise(history))
    if scope != "global":
        assert zeros(masks) == promised(pattern, model, masks, goal)


@pytest.mark.parametrize(("text", "scope"), EXCHANGEABLE)
def test_only_an_exchange_brings_weights_back(text, scope):
    pattern, shape = parsed(text, scope), fitting_shape(text)
    random = torch.Generator().manual_seed(4)
    score, gradient = torch.randn(2, *shape, generator=random)
    kept = pattern.mask(torch.rand(shape, generator=random), 0.3)
    gradient += 5.0 * ~kept  # what is pruned would help most
    none = exchange(score, kept, gradient, pattern, 0.5, 0.0)
    assert torch.equal(none, pattern.mask(score, 0.5, allowed=kept))
    some = exchange(score, kept, gradient, pattern, 0.5, 0.9)
    assert bool((some & ~kept).any())
    assert int((~some).sum()) == pattern.pruned(shape, 0.5)
    survivors = pattern.mask(score, 0.95, allowed=kept)
    assert bool((some | ~survivors).all())
