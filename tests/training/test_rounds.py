"""Rounds: what chooses the weights, where a retraining begins, what a second call resumes."""

from __future__ import annotations

import copy

import pytest
import torch
from trained import held_out_loss, source_ids, train, untrained
from zoo import tiny_model

from secateur.errors import CheckpointError, RecipeError, VerificationError
from secateur.sparsity.schedules import levels
from secateur.sparsity.schedules.geometric import Geometric
from secateur.training.pruning import (
    Criterion,
    KeepEarly,
    PruningRounds,
    open_masks,
    prune_in_rounds,
    read_weights,
    renew,
    write_weights,
)


class Disturbance:
    """Stands in for a training: moves the kept weights a little, and remembers its rounds."""

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


def in_rounds(rewind, *, rounds=3, early=None, family="llama", saved=None, **options):
    model = tiny_model(family)
    kept = open_masks(model)
    retrain = Disturbance(model, kept)
    how = PruningRounds(Geometric(0.8), rounds, rewind=rewind, **options)
    returned = prune_in_rounds(model, kept, how, retrain, early, saved)
    assert returned == retrain.rounds
    return model, kept, retrain


def smallest(weights, kept, sparsity):
    """The mask by magnitude among the kept, one matrix, by sorting."""
    flat = weights.abs().flatten().masked_fill(~kept.flatten(), -1.0)
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    return mask.view_as(weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_go_back_and_masks_come_from_trained_weights(family, tmp_path):
    early, start = tmp_path / "early.safetensors", tiny_model(family, seed=5)
    write_weights(start, early)
    model, kept, retrain = in_rounds("weights", early=early, rewind_step=40, family=family)
    weights, masks = dict(tiny_model(family).named_parameters()), open_masks(tiny_model(family))
    for level, this, found in zip(
        levels(Geometric(0.8), 3), retrain.rounds, retrain.found, strict=True
    ):
        assert this.sparsity == level
        masks = {n: smallest(weights[n].detach(), masks[n], level) for n in masks}
        for name, value in start.named_parameters():
            assert torch.equal(found[name], value * masks.get(name, True))
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            parameter.data.copy_(found[name])
        Disturbance(twin, masks)(this)
        weights = dict(twin.named_parameters())
    for name in masks:
        assert torch.equal(kept[name], masks[name])
        assert int((~kept[name]).sum()) == round(0.8 * kept[name].numel())


@pytest.mark.parametrize("rewind", ["rate", "none"])
def test_weights_go_on(rewind):
    _, _, retrain = in_rounds(rewind)
    dense = dict(tiny_model("llama").named_parameters())
    for name, found in retrain.found[0].items():
        assert bool(((found == dense[name]) | (found == 0)).all())


@pytest.mark.parametrize(
    ("rewind", "step", "spans"),
    [
        ("none", 0, [(0, 10, 30), (10, 20, 30), (20, 30, 30)]),
        ("rate", 0, [(0, 10, 10)] * 3),
        ("rate", 7, [(7, 10, 10)] * 3),
        ("weights", 4, [(4, 10, 10)] * 3),
    ],
)
def test_the_steps_of_each_round(rewind, step, spans):
    how = PruningRounds(Geometric(0.5), 3, rewind=rewind, rewind_step=step)
    assert [how.span(number, 10) for number in (1, 2, 3)] == spans


def test_one_round_is_one_shot():
    _, kept, retrain = in_rounds("rate", rounds=1)
    assert [r.sparsity for r in retrain.rounds] == [0.8]
    masks = Criterion().masks(tiny_model("llama"), open_masks(tiny_model("llama")), 0.8)
    assert all(torch.equal(kept[name], masks[name]) for name in masks)


class Stopped(KeyboardInterrupt):
    """Somebody pressed a key."""


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_second_call_resumes(stop, tmp_path):
    whole, kept_whole, _ = in_rounds("rate")
    model = tiny_model("llama")
    kept = open_masks(model)
    disturb = Disturbance(model, kept)

    def stopping(this):
        disturb(this)
        if this.number == stop:
            raise Stopped

    how = PruningRounds(Geometric(0.8), 3)
    with pytest.raises(Stopped):
        prune_in_rounds(model, kept, how, stopping, saved=tmp_path)
    model, kept, again = in_rounds("rate", saved=tmp_path)
    assert [r.number for r in again.rounds] == list(range(stop, 4))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert all(torch.equal(kept_whole[name], kept[name]) for name in kept_whole)
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "round-3.masks.safetensors",
        "round-3.weights.safetensors",
    ]


def test_stored_masks_of_a_round_are_used_again(tmp_path):
    model = tiny_model("llama")
    kept = open_masks(model)
    other = {name: torch.rand(mask.shape) < 0.5 for name, mask in kept.items()}

    def stop(this):
        raise Stopped

    with pytest.raises(Stopped):
        prune_in_rounds(model, kept, PruningRounds(Geometric(0.5), 1), stop, saved=tmp_path)
    from safetensors.torch import save_file

    save_file(other, tmp_path / "round-1.masks.safetensors")
    model = tiny_model("llama")
    kept = open_masks(model)
    prune_in_rounds(
        model, kept, PruningRounds(Geometric(0.5), 1), lambda this: None, saved=tmp_path
    )
    assert all(torch.equal(kept[name], other[name]) for name in kept)


def test_a_retraining_that_fills_zeros_is_found():
    model = tiny_model("llama")
    kept = open_masks(model)

    def careless(this):
        model.get_parameter(next(iter(kept))).data.add_(0.1)

    with pytest.raises(VerificationError, match="pruned weights") as raised:
        prune_in_rounds(model, kept, PruningRounds(Geometric(0.5), 2), careless)
    assert next(iter(kept)) in str(raised.value)


def test_early_weights_are_kept_and_put_back(tmp_path):
    model = tiny_model("llama")  # tied embeddings
    hook = KeepEarly(3, tmp_path / "early.safetensors")
    for step in range(1, 6):
        next(model.parameters()).data.add_(1.0)
        hook.on_step(step, 5, model, None)
    wanted = {n: p.detach().clone() for n, p in tiny_model("llama").named_parameters()}
    wanted[next(iter(wanted))] += 3.0
    read_weights(model, hook.file)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, wanted[name])


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    write_weights(tiny_model("gpt2"), file)
    with pytest.raises(RecipeError, match="of another model"):
        read_weights(tiny_model("llama"), file)


def test_refuses_to_rewind_to_weights_that_are_not_there():
    model = tiny_model("llama")
    how = PruningRounds(Geometric(0.5), 1, rewind="weights", rewind_step=4)
    with pytest.raises(CheckpointError, match="no weights to go back to"):
        prune_in_rounds(model, open_masks(model), how, lambda this: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "0 rounds"),
        ({"rounds": 1, "rewind": "weight"}, "did you mean 'weights'"),
        ({"rounds": 1, "rewind_step": -1}, "rewind_step is -1"),
        ({"rounds": 1, "rewind": "none", "rewind_step": 1}, "nothing goes back"),
    ],
)
def test_refuses_what_cannot_be(options, said):
    with pytest.raises(RecipeError, match=said):
        PruningRounds(Geometric(0.5), **options)


def test_refuses_to_go_back_behind_the_end():
    with pytest.raises(RecipeError, match="one training has 10 steps"):
        PruningRounds(Geometric(0.5), 1, rewind_step=10).span(1, 10)


@pytest.mark.slow
def test_a_ticket_beats_new_random_weights_under_the_same_mask(trained):
    """One seed of `benchmarks/quality/tickets.py`, half as long."""
    text, held_out = source_ids(), source_ids(held_out=True)
    ticket = copy.deepcopy(trained.model)
    kept = open_masks(ticket)

    def retrain(this):
        first, last, _ = how.span(this.number, trained.steps)
        train(ticket, text, steps=last, first_step=first, kept=kept)

    how = PruningRounds(Geometric(0.8), 1, rewind="weights", rewind_step=trained.early_step)
    prune_in_rounds(ticket, kept, how, retrain, trained.early)
    anew = untrained(seed=1000)
    renew(anew, open_masks(anew), kept)
    train(anew, text, steps=trained.steps, kept=kept)
    assert held_out_loss(ticket, held_out) < held_out_loss(anew, held_out) - 0.02
