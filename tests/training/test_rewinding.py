"""Rounds: what is pruned by what, where each retraining begins, and that masks are checked."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.errors import CheckpointError, RecipeError, VerificationError
from secateur.sparsity.schedules import levels
from secateur.sparsity.schedules.geometric import Geometric
from secateur.training.gradual import open_masks, renew
from secateur.training.rewinding import Early, KeepEarly, Rounds, prune_in_rounds
from secateur.training.selecting import Criterion
from trained import held_out_loss, source_ids, train, untrained
from zoo import tiny_model


class Disturbance:
    """Stands in for a training: moves the kept weights a little, and remembers what it was told."""

    def __init__(self, model, kept):
        self.model, self.kept = model, kept
        self.rounds, self.found = [], []

    def __call__(self, this):
        self.rounds.append(this)
        self.found.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        random = torch.Generator().manual_seed(this.number)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                moved = parameter + 0.2 * torch.randn(parameter.shape, generator=random)
                parameter.copy_(moved * self.kept.get(name, True))


def in_rounds(rewind, *, rounds=3, early=None, family="llama", **options):
    model = tiny_model(family)
    kept = open_masks(model)
    retrain = Disturbance(model, kept)
    how = Rounds(Geometric(0.8), rounds, rewind=rewind, **options)
    told = prune_in_rounds(model, kept, how, retrain, early)
    assert told == retrain.rounds
    return model, kept, retrain


def smallest(weights, kept, sparsity):
    """The mask by magnitude among the kept, one matrix, by sorting."""
    flat = weights.abs().flatten().masked_fill(~kept.flatten(), -1.0)
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    return mask.view_as(weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_go_back_and_masks_come_from_trained_weights(family):
    early = Early.of(tiny_model(family, seed=5), step=40)
    model, kept, retrain = in_rounds("weights", early=early, rewind_step=40, family=family)
    assert [r.first_step for r in retrain.rounds] == [40, 40, 40]
    weights, masks = dict(tiny_model(family).named_parameters()), open_masks(tiny_model(family))
    for level, this, found in zip(
        levels(Geometric(0.8), 3), retrain.rounds, retrain.found, strict=True
    ):
        assert this.sparsity == level
        masks = {n: smallest(weights[n].detach(), masks[n], level) for n in masks}
        for name, start in early.parameters.items():
            assert torch.equal(found[name], start * masks.get(name, True))
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            parameter.data.copy_(found[name])
        Disturbance(twin, masks)(this)
        weights = dict(twin.named_parameters())
    for name in masks:
        assert torch.equal(kept[name], masks[name])
        assert int((~kept[name]).sum()) == round(0.8 * kept[name].numel())


@pytest.mark.parametrize(("rewind", "step", "told"), [("rate", 7, 7), ("nothing", 0, None)])
def test_weights_go_on(rewind, step, told):
    _, _, retrain = in_rounds(rewind, rewind_step=step)
    assert [r.first_step for r in retrain.rounds] == [told] * 3
    dense = dict(tiny_model("llama").named_parameters())
    for name, found in retrain.found[0].items():
        assert bool(((found == dense[name]) | (found == 0)).all())


def test_one_round_is_one_shot():
    _, kept, retrain = in_rounds("rate", rounds=1)
    assert [r.sparsity for r in retrain.rounds] == [0.8]
    masks = Criterion().masks(tiny_model("llama"), open_masks(tiny_model("llama")), 0.8)
    assert all(torch.equal(kept[name], masks[name]) for name in masks)


def test_finished_rounds_are_not_done_again():
    whole, kept_whole, retrain = in_rounds("rate")
    model = tiny_model("llama")
    Early(0, retrain.found[1]).restore(model)  # as round 2 was about to train it
    kept = open_masks(model)
    again = Disturbance(model, kept)
    again(retrain.rounds[1])
    told = prune_in_rounds(model, kept, Rounds(Geometric(0.8), 3), again, finished=2)
    assert told == retrain.rounds[2:]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert all(torch.equal(kept_whole[name], kept[name]) for name in kept_whole)


def test_a_retraining_that_fills_zeros_is_found():
    model = tiny_model("llama")
    kept = open_masks(model)

    def careless(this):
        model.get_parameter(next(iter(kept))).data.add_(0.1)

    with pytest.raises(VerificationError, match="pruned weights") as raised:
        prune_in_rounds(model, kept, Rounds(Geometric(0.5), 2), careless)
    assert next(iter(kept)) in str(raised.value)


def test_early_weights_are_kept_saved_and_put_back(tmp_path):
    model = tiny_model("llama")  # tied embeddings
    hook = KeepEarly(3)
    for step in range(1, 6):
        next(model.parameters()).data.add_(1.0)
        hook.on_step(step, 5, model, None)
    assert hook.early is not None
    wanted = {n: p.detach().clone() for n, p in tiny_model("llama").named_parameters()}
    wanted[next(iter(wanted))] += 3.0
    file = hook.early.save(tmp_path)
    for early in (hook.early, Early.load(file)):
        assert early.step == 3
        early.restore(model)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, wanted[name])
    with pytest.raises(CheckpointError, match="end in a step"):
        Early.load(tmp_path / "weights.safetensors")


def test_early_weights_of_another_model_are_refused():
    with pytest.raises(RecipeError, match="of another model"):
        Early.of(tiny_model("gpt2")).restore(tiny_model("llama"))
    short = Early(0, dict(list(Early.of(tiny_model("llama")).parameters.items())[1:]))
    with pytest.raises(RecipeError, match="of another model"):
        short.restore(tiny_model("llama"))


@pytest.mark.parametrize("early", [None, Early(3, {})])
def test_refuses_to_rewind_to_weights_that_are_not_there(early):
    model = tiny_model("llama")
    how = Rounds(Geometric(0.5), 1, rewind="weights", rewind_step=4)
    with pytest.raises(RecipeError, match="weights of step 4"):
        prune_in_rounds(model, open_masks(model), how, lambda this: None, early)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "0 rounds"),
        ({"rounds": 1, "rewind": "weight"}, "did you mean 'weights'"),
        ({"rounds": 1, "rewind_step": -1}, "step -1"),
    ],
)
def test_refuses_what_cannot_be(options, said):
    with pytest.raises(RecipeError, match=said):
        Rounds(Geometric(0.5), **options)


def test_a_ticket_beats_new_random_weights_under_the_same_mask(trained):
    """Seeds and sizes of its own: benchmarks/tickets.py. This is one of them, half as long."""
    text, held_out = source_ids(), source_ids(held_out=True)
    ticket = copy.deepcopy(trained.model)
    kept = open_masks(ticket)

    def retrain(this):
        train(ticket, text, steps=trained.steps, first_step=this.first_step, kept=kept)

    how = Rounds(Geometric(0.8), 1, rewind="weights", rewind_step=trained.early.step)
    prune_in_rounds(ticket, kept, how, retrain, trained.early)
    anew = untrained(seed=1000)
    renew(anew, open_masks(anew), kept)
    train(anew, text, steps=trained.steps, kept=kept)
    assert held_out_loss(ticket, held_out) < held_out_loss(anew, held_out) - 0.02
