"""Learned structured masks: gates, the way to the target, and what a settled model computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import mse_loss
from zoo import tiny_model, tiny_windows

from secateur.errors import RecipeError
from secateur.training.learned_masks import Consumer, HardConcrete, LearnedMasks, Shape

LLAMA = {"neurons": Consumer("mlp.down_proj"), "groups": Consumer("self_attn.o_proj", 16)}
GPT2 = {"neurons": Consumer("mlp.c_proj"), "groups": Consumer("attn.c_proj", 8)}
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
    assert log_alpha == 3
    one = 1 / (1 + math.exp(2 / 3 * math.log(1.1 / 0.1) - log_alpha))  # P(z = 1)
    assert one == pytest.approx(0.802, abs=5e-4)
    assert float((drawn == 1).float().mean()) == pytest.approx(one, abs=0.005)
    assert float((drawn > 0).float().mean()) == pytest.approx(0.990, abs=0.005)
    assert "P(z = 1) = 0.802" in HardConcrete.__doc__


def test_of_equal_gates_the_later_are_kept_however_many_there_are():
    random = torch.Generator().manual_seed(0)
    gates = HardConcrete(3001, 1000)
    gates.log_alpha.data = torch.randint(0, 7, (3001,), generator=random).float()
    order = sorted(range(3001), key=lambda i: (float(gates.log_alpha[i].detach()), i))
    assert gates.kept() == tuple(sorted(order[2001:]))
    assert gates.settled().nonzero()[:, 0].tolist() == list(gates.kept())


def test_gates_keep_exactly_their_target():
    gates = HardConcrete(5, 3)
    gates.log_alpha.data = torch.tensor([0.5, 2.0, 0.5, -1.0, 3.0])
    assert gates.kept() == (1, 2, 4)
    assert gates.settled().tolist() == [0, 1, 1, 0, 1]


def test_useless_neurons_are_found():
    model = tiny_model("llama").requires_grad_(False)
    useful = {}
    random = torch.Generator().manual_seed(4)
    for index, layer in enumerate(model.model.layers):
        useful[index] = tuple(sorted(torch.randperm(48, generator=random)[:20].tolist()))
        useless = [i for i in range(48) if i not in useful[index]]
        layer.mlp.down_proj.weight[:, useless] *= 0.01
    wanted = logits_of(model)
    masks = LearnedMasks(model, Shape(neurons=20), LLAMA)
    learn(model, masks, lambda m, batch: 1000 * mse_loss(logits_of(m), wanted))
    kept = masks.settle()["neurons"]
    found = sum(len(set(kept[i]) & set(useful[i])) for i in useful)
    assert {len(units) for units in kept.values()} == {20}
    assert found >= 45  # of 60; 25 by chance


@pytest.mark.parametrize("target", [4, 24, 44])
def test_multipliers_drive_open_gates_to_their_target(target):
    masks = LearnedMasks(tiny_model("llama"), Shape(neurons=target), LLAMA)
    learn(None, masks, lambda m, batch: torch.zeros(()), steps=400)
    for gates in masks.sets.values():
        assert gates.open_share().item() == pytest.approx(target / 48, abs=0.08)


def test_all_kinds_keep_exactly_what_is_wanted():
    model = tiny_model("llama").requires_grad_(False)
    shape = Shape(groups=1, neurons=24, layers=2, hidden=24)
    masks = LearnedMasks(model, shape, LLAMA)
    wanted = logits_of(model)
    learn(model, masks, lambda m, batch: mse_loss(logits_of(m), wanted), steps=60)
    kept = masks.settle()
    assert len(kept["layers"]) == 2
    assert len(kept["hidden"]) == 24
    assert set(kept["groups"]) == set(kept["neurons"]) == set(kept["layers"])
    assert all(len(units) == 1 for units in kept["groups"].values())
    assert all(len(units) == 24 for units in kept["neurons"].values())
    masks.remove()
    assert torch.equal(logits_of(model), wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neurons", "groups", "layers", "hidden"])
def test_a_settled_model_is_one_without_those_units(kind):
    model = tiny_model("llama")
    oracle = copy.deepcopy(model)
    masks = LearnedMasks(model, Shape(**{kind: {"groups": 1}.get(kind, 2)}), LLAMA)
    for number, gates in enumerate(masks.sets.values()):
        random = torch.Generator().manual_seed(number)
        gates.log_alpha.copy_(torch.randn(gates.units, generator=random))
    kept = masks.settle()[kind]
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
        width = LLAMA[kind].width
        for index, layer in enumerate(oracle.model.layers):
            weight = layer.get_submodule(LLAMA[kind].name).weight
            for unit in range(weight.shape[1] // width):
                if unit not in kept[index]:
                    weight[:, unit * width : (unit + 1) * width] = 0
    torch.testing.assert_close(logits_of(model), logits_of(oracle), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transposed_weights_have_their_columns_too():
    model = tiny_model("gpt2")
    masks = LearnedMasks(model, Shape(groups=3, neurons=100), GPT2)
    assert {gates.units for gates in masks.sets.values()} == {4, 128}
    kept = masks.settle()
    for index, layer in enumerate(model.transformer.h):
        gone = [i for i in range(128) if i not in kept["neurons"][index]]
        gated = logits_of(model)
        layer.mlp.c_proj.weight[gone] = 0
        torch.testing.assert_close(logits_of(model), gated)


def test_the_model_learns_beside_its_gates():
    model = tiny_model("llama")
    masks = LearnedMasks(model, Shape(neurons=24), LLAMA)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    gated = masks.objective(lambda m, b: m(input_ids=b, labels=b, use_cache=False).loss)
    for step in range(1, 41):
        gated(model, WINDOWS).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.on_step(step, 40, model, optimizer)
    masks.settle()
    with torch.no_grad():
        after = model(input_ids=WINDOWS, labels=WINDOWS).loss
        before = tiny_model("llama")(input_ids=WINDOWS, labels=WINDOWS).loss
    assert after < before - 1


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {}, "no kind of unit"),
        ("llama", {"neurons": 10, "learning_rate": 0.0}, "learning_rate 0.0"),
        ("llama", {"neurons": 49}, "keeps 49 of 48 units"),
        ("llama", {"layers": 0}, "keeps 0 of 3 units"),
        ("gemma2", {"hidden": 16}, "does not declare all linears"),
    ],
)
def test_refuses_what_cannot_be(family, options, said):
    with pytest.raises(RecipeError, match=said):
        LearnedMasks(tiny_model(family), Shape(**options), LLAMA)


def test_refuses_consumers_that_do_not_fit():
    with pytest.raises(RecipeError, match="no linear is named that reads the neurons"):
        LearnedMasks(tiny_model("llama"), Shape(neurons=4), {})
    with pytest.raises(RecipeError, match="48 columns do not divide"):
        LearnedMasks(
            tiny_model("llama"), Shape(neurons=4), {"neurons": Consumer("mlp.down_proj", 7)}
        )


def test_a_resumed_training_draws_the_same_gates():
    def begun():
        return LearnedMasks(tiny_model("llama"), Shape(neurons=24, groups=1), LLAMA, seed=3)

    def steps(masks, first, last):
        gated = masks.objective(lambda model, batch: mse_loss(masks.drawn["neurons 0"], WANTED))
        for step in range(first, last + 1):
            for _ in range(2):  # parts of a step draw gates of their own
                gated(None, None).backward()
            masks.on_step(step, 20, None, None)
        return masks

    straight, stopped = steps(begun(), 1, 12), steps(begun(), 1, 7)
    resumed = begun()
    for name, value in stopped.state().items():
        resumed.state()[name].data.copy_(value.detach())
    steps(resumed, 8, 12)
    for name, value in straight.state().items():
        assert torch.equal(value, resumed.state()[name]), name
    other = LearnedMasks(tiny_model("llama"), Shape(neurons=24, groups=1), LLAMA, seed=4)
    straight.draw()
    other.draw()
    assert not torch.equal(straight.drawn["neurons 0"], other.drawn["neurons 0"])


WANTED = torch.linspace(0, 1, 48)
