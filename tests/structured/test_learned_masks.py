"""Learned structured masks: gates, the way to the target, and what a settled model computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import mse_loss
from zoo import tiny_model, tiny_windows

from secateur.errors import NumericalError, RecipeError
from secateur.structured import learned
from secateur.structured.cut import consumers, sizes_of, unit_width
from secateur.structured.learned import DomainLoading, HardConcrete, LearnedMasks
from secateur.training.batches import Batches

WINDOWS = tiny_windows(samples=4)


def logits_of(model):
    return model(input_ids=WINDOWS, use_cache=False).logits


def learn(model, masks, objective, steps=150):
    """A loop as the library's: loss, backward, step, hook; the model itself stays as it is."""
    gated = masks.objective(objective)
    for step in range(1, steps + 1):
        gated(model, WINDOWS).backward()
        masks.on_step(step, steps, model, None)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_gates_are_open_as_often_as_they_say(log_alpha):
    gates = HardConcrete(40_000, 1)
    gates.log_alpha.data.fill_(log_alpha)
    drawn = gates.sample(torch.Generator().manual_seed(0))
    assert float((drawn > 0).float().mean()) == pytest.approx(gates.open_share().item(), abs=0.01)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    assert bool((drawn == 0).any())
    assert bool((drawn == 1).any())
    drawn.sum().backward()
    assert bool((gates.log_alpha.grad[(drawn > 0) & (drawn < 1)] > 0).all())


def test_gates_begin_as_open_as_they_say():
    gates = HardConcrete(200_000, 1)
    drawn = gates.sample(torch.Generator().manual_seed(0))
    log_alpha = float(gates.log_alpha[0].detach())
    one = 1 / (1 + math.exp(2 / 3 * math.log(1.1 / 0.1) - log_alpha))  # P(z = 1)
    assert one == pytest.approx(0.802, abs=5e-4)
    assert float((drawn == 1).float().mean()) == pytest.approx(one, abs=0.005)
    assert float((drawn > 0).float().mean()) == pytest.approx(0.990, abs=0.005)


def test_of_equal_gates_the_later_are_kept_however_many_there_are():
    random = torch.Generator().manual_seed(0)
    gates = HardConcrete(3001, 1000)
    gates.log_alpha.data = torch.randint(0, 7, (3001,), generator=random).float()
    order = sorted(range(3001), key=lambda i: (float(gates.log_alpha[i].detach()), i))
    assert gates.kept().tolist() == sorted(order[2001:])
    assert gates.settled().nonzero()[:, 0].tolist() == gates.kept().tolist()


def test_useless_neurons_are_found():
    model = tiny_model("llama").requires_grad_(False)
    useful = {}
    random = torch.Generator().manual_seed(4)
    for index, layer in enumerate(model.model.layers):
        useful[index] = tuple(sorted(torch.randperm(48, generator=random)[:20].tolist()))
        useless = [i for i in range(48) if i not in useful[index]]
        layer.mlp.down_proj.weight[:, useless] *= 0.01
    wanted = logits_of(model)
    masks = LearnedMasks(model, {"neurons": 20})
    learn(model, masks, lambda m, batch: 1000 * mse_loss(logits_of(m), wanted))
    kept = masks.settle().neurons
    found = sum(len(set(kept[i]) & set(useful[i])) for i in useful)
    assert {len(units) for units in kept.values()} == {20}
    assert found >= 45  # of 60; 25 by chance


@pytest.mark.parametrize("target", [4, 24, 44])
def test_multipliers_drive_open_gates_to_their_target(target):
    masks = LearnedMasks(tiny_model("llama"), {"neurons": target})
    learn(None, masks, lambda m, batch: torch.zeros(()), steps=400)
    for gates in masks.sets.values():
        assert gates.open_share().item() == pytest.approx(target / 48, abs=0.08)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neurons", "groups", "layers", "hidden"])
def test_a_settled_model_is_one_without_those_units(kind):
    model = tiny_model("llama")
    oracle = copy.deepcopy(model)
    masks = LearnedMasks(model, {kind: {"groups": 1}.get(kind, 2)})
    for number, gates in enumerate(masks.sets.values()):
        random = torch.Generator().manual_seed(number)
        gates.log_alpha.copy_(torch.randn(gates.units, generator=random))
    kept = getattr(masks.settle(), kind)
    if kind == "layers":
        for index, layer in enumerate(oracle.model.layers):
            if index not in kept:
                layer.self_attn.o_proj.weight.zero_()
                layer.self_attn.o_proj.bias.zero_()
                layer.mlp.down_proj.weight.zero_()
    elif kind == "hidden":
        gone = [i for i in range(32) if i not in kept]
        oracle.lm_head.weight = torch.nn.Parameter(oracle.lm_head.weight.clone())  # was tied
        oracle.model.embed_tokens.weight[:, gone] = 0
        for layer in oracle.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.self_attn.o_proj.bias[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
    else:
        name, width = consumers(oracle)[kind], unit_width(sizes_of(oracle), kind)
        for index, layer in enumerate(oracle.model.layers):
            weight = layer.get_submodule(name).weight
            for unit in range(weight.shape[1] // width):
                if unit not in kept[index]:
                    weight[:, unit * width : (unit + 1) * width] = 0
    torch.testing.assert_close(logits_of(model), logits_of(oracle), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transposed_weights_have_their_columns_too():
    model = tiny_model("gpt2")
    masks = LearnedMasks(model, {"groups": 3, "neurons": 100})
    assert {gates.units for gates in masks.sets.values()} == {4, 128}
    kept = masks.settle()
    for index, layer in enumerate(model.transformer.h):
        gone = [i for i in range(128) if i not in kept.neurons[index]]
        gated = logits_of(model)
        layer.mlp.c_proj.weight[gone] = 0
        torch.testing.assert_close(logits_of(model), gated)


def test_a_family_without_writers_has_no_gates_on_channels():
    with pytest.raises(RecipeError, match="gemma2"):
        LearnedMasks(tiny_model("gemma2"), {"hidden": 16})


DOMAINS = {"code": torch.zeros(30, 4).long(), "prose": torch.arange(10)[:, None].expand(10, 4) + 1}
TOGETHER = torch.cat(list(DOMAINS.values()))


def loading(losses=None, size=8, **options):
    known, references = losses or {"code": 1.0, "prose": 2.0}, {"code": 1.0, "prose": 2.0}
    return DomainLoading(DOMAINS, references, lambda model: known, size=size, **options)


def read(order, first, last):
    """The windows of some steps, as the training loop reads them."""
    batches, found = Batches(TOGETHER, order.size, 0, order.numbers), []
    for step in range(first, last):
        numbers, device = batches.numbers(step), torch.device("cpu")
        found.append(batches.parts(numbers, order.size, device)[0].ids)
        order.on_step(step + 1, 1000, None, None)
    return found


def test_proportions_follow_the_formula():
    order = loading()
    assert order.weights.tolist() == [0.75, 0.25]
    order.update({"code": 0.5, "prose": 2.6})
    order.update({"code": 1.2, "prose": 2.1})
    code, prose = 0.75 * math.exp(0.2), 0.25 * math.exp(0.6 + 0.1)
    assert float(order.weights[0]) == pytest.approx(code / (code + prose))
    assert float(order.weights.sum()) == pytest.approx(1)
    order.update({"code": 5000.0, "prose": 2.0})
    assert order.weights.tolist() == [1.0, 0.0]
    with pytest.raises(NumericalError, match="nan"):
        order.update({"code": 1.0, "prose": math.nan})


def test_batches_have_these_proportions_and_windows_of_all():
    order = loading()
    order.update({"code": 1.0, "prose": 2.0 + math.log(9)})  # 1 to 3
    batches = read(order, 0, 500)
    assert {tuple(b.shape) for b in batches} == {(8, 4)}
    prose = [int(row[0]) for b in batches for row in b if int(row[0])]
    assert len(prose) / 4000 == pytest.approx(0.75, abs=0.03)
    assert {prose.count(window) for window in range(1, 11)} <= set(range(250, 350))


def test_an_update_changes_the_batches_to_come(monkeypatch):
    monkeypatch.setattr(learned, "UPDATE_EVERY", 3)
    batches = read(loading({"code": 1.0, "prose": 40.0}, size=64), 0, 5)
    assert all(bool((b[:, 0] == 0).any()) for b in batches[:3])
    assert not any(bool((b[:, 0] == 0).any()) for b in batches[3:])


@pytest.mark.parametrize("stop", [1, 7, 8])
def test_a_resumed_run_reads_the_same(stop, monkeypatch):
    monkeypatch.setattr(learned, "UPDATE_EVERY", 4)
    losses = {"code": 1.1, "prose": 2.4}
    straight = read(loading(losses, seed=5), 0, 20)
    stopped = loading(losses, seed=5)
    first = read(stopped, 0, stop)
    resumed = loading(losses, seed=5)
    for name, value in stopped.state().items():
        resumed.state()[name].copy_(value)
    again = [*first, *read(resumed, stop, 20)]
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
