"""Halted forwards give what plain forwards give, wherever their tensors wait meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import tiny_model, tiny_windows

from secateur.engine.stream.calls import call_layer, first_inputs, layer_calls
from secateur.engine.stream.halted_forwards import (
    ActivationOffload,
    HaltingForwards,
    batches_of,
    by_group,
    by_layer,
)
from secateur.errors import ArchitectureError
from secateur.models.architecture import describe, linears_of


class Stage:
    """One decoder layer of a tiny model, with inputs for a few micro-batches."""

    def __init__(self, family: str = "llama", batches: int = 3) -> None:
        self.model = tiny_model(family)
        self.architecture = describe(self.model)
        layers = self.architecture.layers(self.model)
        self.layer = layers[0]
        windows = tiny_windows(2 * batches).split(2)
        self.hidden = [first_inputs(self.model, layers, ids) for ids in windows]
        self.call = layer_calls(self.model, layers, list(windows))[0]
        linears = linears_of(self.layer, "")
        groups = self.architecture.groups
        assert groups is not None
        self.groups = [[linears[name] for name in group] for group in groups]
        self.outputs: dict[int, torch.Tensor] = {}
        self.offload: ActivationOffload | None = None
        self.repeats = False

    def forward(self, index: int):
        def run() -> None:
            x = self.hidden[index].clone()
            if self.offload is not None:
                self.offload.live.note(x)
            self.outputs[index] = call_layer(self.layer, x, self.call)

        return run

    def forwards(self):
        return [self.forward(i) for i in range(len(self.hidden))]

    def pass_by_group(self, gather, prune, *, forwards=None, **options) -> None:
        batches = batches_of(self.layer, self.groups)
        halting = HaltingForwards(
            batches, forwards or self.forwards(), self.offload, repeats=self.repeats
        )
        try:
            for group in by_group(halting, lambda i, g, x, _: gather(i, g, x.inputs), **options):
                prune(group)
        finally:
            halting.close()

    def plain(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [call_layer(self.layer, x, self.call) for x in self.hidden]


@pytest.mark.parametrize("place", ["frames", "disk", "nowhere"])
@torch.no_grad()
def test_halted_forwards_equal_plain_ones(place: str, tmp_path: Path) -> None:
    stage = Stage()
    expected = stage.plain()
    if place == "disk":
        kept = [*stage.layer.parameters(), *stage.layer.buffers(), *stage.call.tensors()]
        stage.offload = ActivationOffload(kept, tmp_path)
    stage.repeats = place == "nowhere"
    order, pruned = [], []
    stage.pass_by_group(lambda i, group, x: order.append((group, tuple(x.shape))), pruned.append)
    assert pruned == [0, 1, 2, 3]
    assert [group for group, _ in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for index, out in enumerate(expected):
        assert torch.equal(stage.outputs[index], out)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_offloaded_forwards_hold_next_to_nothing(tmp_path: Path) -> None:
    stage = Stage()
    kept = [*stage.layer.parameters(), *stage.call.tensors()]
    stage.offload = offload = ActivationOffload(kept, tmp_path)
    held_while_others_run = []

    def gather(_: int, group: int, x: torch.Tensor) -> None:
        moved = [s for kept in offload.moved.values() for s, _ in kept]
        held_while_others_run.append(sum(s.nbytes() for s in moved))
        assert offload.live.live_bytes() >= x.nbytes

    stage.pass_by_group(gather, lambda group: None)
    assert held_while_others_run == [0] * 12


@torch.no_grad()
def test_later_groups_see_weights_pruned_before_them() -> None:
    stage = Stage(batches=1)
    seen = {}

    def prune(group: int) -> None:
        for linear in stage.groups[group]:
            linear.assign(torch.zeros(linear.shape))

    stage.pass_by_group(lambda i, g, x: seen.setdefault(g, x.clone()), prune)
    # Without q, k and v only the bias of v is left, the same for every token.
    assert torch.allclose(seen[1], seen[1][:, :1].expand_as(seen[1]))
    assert torch.count_nonzero(seen[3]) == 0


@torch.no_grad()
def test_forwards_end_after_the_last_group_when_nothing_follows() -> None:
    stage = Stage()
    reached: list[int] = []
    stage.pass_by_group(lambda i, group, x: None, reached.append, outputs_needed=False)
    assert reached == [0, 1, 2, 3]
    assert stage.outputs == {}


@torch.no_grad()
def test_an_error_in_a_forward_comes_through_and_leaves_no_hook() -> None:
    stage = Stage()

    def broken() -> None:
        raise ValueError("broken forward")

    with pytest.raises(ValueError, match="broken forward"):
        stage.pass_by_group(
            lambda i, g, x: None, lambda g: None, forwards=[*stage.forwards(), broken]
        )
    assert not any(m._forward_pre_hooks for m in stage.layer.modules())


@torch.no_grad()
def test_linears_that_do_not_share_an_input_are_distinguished() -> None:
    stage = Stage()
    wrong = [[*stage.groups[0], *stage.groups[1]], *stage.groups[2:]]
    with pytest.raises(ArchitectureError, match="o_proj"):
        by_layer(batches_of(stage.layer, wrong), stage.forwards(), lambda g, x: None)


def test_calls_that_depend_on_tokens_are_refused() -> None:
    class Embedder(nn.Module):
        """Hands each layer something read off the tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            hidden = torch.zeros(*input_ids.shape, 4)
            for layer in self.layers:
                hidden = layer(hidden, per_token=input_ids.float())
            return hidden

    model = Embedder()
    with pytest.raises(ArchitectureError, match="Embedder"):
        layer_calls(model, model.layers, list(tiny_windows(4).split(2)))
