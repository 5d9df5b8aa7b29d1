"""The next masks: exact counts, any score and pattern, and nothing comes back unasked."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from zoo import matrices, tiny_model, tiny_windows, weight_of

from oracles import exchange as oracle
from secateur.errors import NumericalError, RecipeError
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.scores import scores
from secateur.training.gradual import Criterion, exchange, gather, stage
from secateur.training.masks import open_masks, prunable

WINDOWS = tiny_windows(samples=3)


def zeros_share(masks) -> float:
    return sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "generic"])
def test_statistics_are_those_of_plain_forwards_and_backwards(family):
    model = tiny_model(family)
    linears = prunable(model)
    requires = frozenset({"column_norm", "gram", "gradient", "fisher", "stored"})
    inputs = {x.name: [] for x in linears}
    handles = [
        x.module.register_forward_hook(
            lambda _, args, out, name=x.name: inputs[name].append(args[0].detach().flatten(0, -2))
        )
        for x in linears
    ]
    found = {x.name: [] for x in linears}
    for ids in WINDOWS:
        logits = model(input_ids=ids[None]).logits[0]
        cross_entropy(logits[:-1], ids[1:]).backward()
        for x in linears:
            gradient = x.module.weight.grad
            found[x.name].append((gradient.t() if x.transposed else gradient).clone())
        model.zero_grad()
    for handle in handles:
        handle.remove()
    gathered = gather(model, linears, requires, WINDOWS)
    assert all(p.grad is None for p in model.parameters())
    for x in linears:
        rows, gradients = torch.cat(inputs[x.name]).double(), torch.stack(found[x.name]).double()
        wanted = {
            "column_norm": rows.square().sum(0).sqrt(),
            "gram": rows.t() @ rows,
            "gradient": gradients.mean(0),
            "fisher": gradients.square().mean(0),
            "stored": x.weight,
        }
        for key, value in wanted.items():
            tiny = 1e-5 * float(value.abs().max())
            torch.testing.assert_close(gathered[x.name][key], value.float(), rtol=1e-4, atol=tiny)


def test_frozen_parameters_are_frozen_again():
    model = tiny_model("llama").requires_grad_(False)
    gather(model, prunable(model), frozenset({"gradient"}), WINDOWS)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_a_number_is_refused():
    model = tiny_model("llama")
    next(iter(matrices(model).values())).weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError, match="window 0"):
        gather(model, prunable(model), frozenset({"gradient"}), WINDOWS)


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in scores), ("gpt2", "wanda"), ("gpt2", "taylor")],
)
def test_any_score_prunes_to_the_exact_count(family, name):
    model = tiny_model(family)
    kept = open_masks(model)
    criterion = Criterion(scores[name](), windows=WINDOWS)
    first = criterion.masks(model, kept, 0.3)
    second = criterion.masks(model, first, 0.7)
    for key, mask in second.items():
        assert mask.shape == model.get_parameter(key).shape
        assert int((~first[key]).sum()) == round(0.3 * mask.numel())
        assert int((~mask).sum()) == round(0.7 * mask.numel())
        assert not bool((mask & ~first[key]).any())


@pytest.mark.parametrize("text", ["unstructured", "4x2"])
def test_scope_global_is_one_threshold_over_the_model(text):
    model = tiny_model("llama")
    list(matrices(model).values())[2].weight.data.mul_(0.1)  # this one loses nearly all
    pattern = parse_pattern(text, "global")
    masks = open_masks(model)
    for sparsity in (0.4, 0.8):
        masks = Criterion(pattern=pattern).masks(model, masks, sparsity)
        units = {n: pattern.units(weight_of(m).abs()) for n, m in matrices(model).items()}
        joined = torch.cat([u.flatten() for u in units.values()])
        threshold = joined.sort().values[round(sparsity * len(joined)) - 1]
        for name, mask in masks.items():
            wanted = units[name.removesuffix(".weight")] > threshold
            assert torch.equal(pattern.units(mask.float()) > 0, wanted)
        assert zeros_share(masks) == pytest.approx(sparsity, abs=1e-3)


def test_two_of_four_is_approached_through_three_of_four():
    pattern = parse_pattern("2:4")
    stages = [stage(pattern, s) for s in (0.0, 0.12, 0.13, 0.3, 0.4, 0.5)]
    assert [p and p.name for p in stages] == [None, None, "3:4", "3:4", "2:4", "2:4"]
    model = tiny_model("llama")
    masks = open_masks(model)
    for sparsity, wanted in ((0.05, 0.0), (0.25, 0.25), (0.5, 0.5)):
        new = Criterion(pattern=pattern).masks(model, masks, sparsity)
        assert zeros_share(new) == wanted
        assert not any(bool((new[n] & ~masks[n]).any()) for n in new)
        masks = new


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_exchange_equals_its_oracle(fraction):
    random = torch.Generator().manual_seed(0)
    score, gradient = torch.rand(2, 6, 10, generator=random)
    gradient -= 0.5
    kept = torch.rand(6, 10, generator=random) < 0.7
    pattern = parse_pattern("unstructured", "layer")
    mask = exchange(score, kept, gradient, pattern, 0.5, fraction)
    given_up = round(60 * (0.5 + fraction * 0.5)) - 30
    assert mask.tolist() == oracle.exchanged(score, kept, gradient, 30, given_up)
    assert int((~mask).sum()) == 30
    assert bool((mask & ~kept).any())


@pytest.mark.parametrize("text", ["unstructured", "4x2", "*x1"])
def test_exchanged_masks_have_the_exact_count(text):
    model = tiny_model("gpt2")
    criterion = Criterion(pattern=parse_pattern(text), windows=WINDOWS)
    first = criterion.masks(model, open_masks(model), 0.5)
    second = criterion.masks(model, first, 0.5, exchanged=0.2)
    for name in first:
        assert int((~second[name]).sum()) == int((~first[name]).sum())
    assert any(bool((second[n] & ~first[n]).any()) for n in first)


def test_refuses_what_cannot_be():
    model = tiny_model("llama")
    masks = open_masks(model)
    with pytest.raises(RecipeError, match="no windows"):
        Criterion(scores["wanda"]()).masks(model, masks, 0.5)
    with pytest.raises(RecipeError, match="2:4"):
        Criterion(pattern=parse_pattern("2:4"), windows=WINDOWS).masks(model, masks, 0.5, 0.1)
