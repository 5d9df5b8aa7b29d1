"""Refitting beside the uncut model, against whole forwards and plain least squares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from slow import FEW_FAMILIES, few_families, slow_but
from torch import nn
from zoo import CONFIGS, PLAIN_MIXTURES, tiny_model, tiny_windows

from oracles import uncut
from oracles.depth import divergence
from secateur.engine.prune.refit import Refit, can_refit
from secateur.engine.prune.tasks import Settings
from secateur.models.architecture import describe
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.runs.ledger import Ledger
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_model

pytestmark = pytest.mark.filterwarnings("ignore::secateur.structured.surgery.VariedSizesWarning")

CUTS = {
    "a layer": Cut(layers=(0, 2)),
    "the first and the last layer": Cut(layers=(1,)),
    "channels": Cut(hidden=tuple(range(1, 25))),
    "layers and channels": Cut(layers=(0, 1), hidden=tuple(range(0, 32, 2))),
    "sub-blocks": Cut(layers=(1, 2), groups={1: ()}, neurons={2: ()}),
}
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "olmo2",
            "mixtral", "qwen2_moe"]  # fmt: skip
UNKNOWN = {"gemma2", "opt", "olmo2"}
"""Of them, those of which it is not known what writes to the stream."""

POSSIBLE = [(f, n) for f in FAMILIES for n, cut in CUTS.items() if cut.hidden or f not in UNKNOWN]


def cut_of(dense: nn.Module, cut: Cut) -> Any:
    """The model that is left, with weights of its own."""
    return copy.deepcopy(cut_model(dense, cut))


def refitted(dense: nn.Module, left: nn.Module, cut: Cut, settings: Settings = Settings()) -> None:  # noqa: B008
    """Refit in place."""
    layers = range(3) if cut.layers is None else cut.layers
    Refit(
        ModelTarget(dense), ModelTarget(left), layers, tiny_windows(), settings,
        Ledger(), Silent(), channels=cut.hidden,
    ).execute()  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"),
    slow_but(
        [(f, n) for f, n in POSSIBLE if f in FEW_FAMILIES],
        POSSIBLE,
    ),
)
def test_weights_are_those_of_the_oracle(family: str, name: str) -> None:
    cut, dense = CUTS[name], tiny_model(family)
    architecture = describe(dense)
    left = cut_of(dense, cut)
    groups = [g for g in architecture.groups or () if not architecture.of_expert(g[0])]
    wanted = uncut.refit(
        dense, left, architecture.layers_path, groups, architecture.writers,
        range(3) if cut.layers is None else cut.layers, cut.hidden, tiny_windows(),
    )  # fmt: skip
    before = divergence(dense, left, tiny_windows())
    untouched = {n: p.clone() for n, p in dense.named_parameters()}
    refitted(dense, left, cut)
    for (parameter, found), other in zip(left.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            found, other, rtol=1e-3, atol=1e-3 * float(other.detach().abs().max()), msg=parameter
        )
    assert all(torch.equal(p, untouched[n]) for n, p in dense.named_parameters())
    if architecture.writers:
        assert divergence(dense, left, tiny_windows()) < 0.9 * before


def test_what_a_linear_map_can_make_up_for_is_made_up_for() -> None:
    """A layer that adds the same to every token is hardly missed: the FFN before it learns that."""
    dense = tiny_model("llama")
    layer = dense.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.o_proj.bias.normal_()
        layer.mlp.down_proj.weight.zero_()
    cut = Cut(layers=(0, 2))
    left = cut_of(dense, cut)
    before = divergence(dense, left, tiny_windows())
    refitted(dense, left, cut, Settings(asymmetric_damping=1e-6))
    assert divergence(dense, left, tiny_windows()) < 0.05 * before


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_hidden_states_on_disk_give_the_same_weights(family: str, tmp_path: Path) -> None:
    cut, dense = Cut(layers=(0, 2)), tiny_model(family)
    inside, outside = cut_of(dense, cut), cut_of(dense, cut)
    refitted(dense, inside, cut)
    tokens = tiny_windows().shape[1]
    refitted(
        dense, outside, cut,
        Settings(activations="disk", work=tmp_path, micro_batch_tokens=2 * tokens),
    )  # fmt: skip
    for (name, found), other in zip(outside.named_parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4, msg=name)
    assert not [*tmp_path.rglob("inputs-*")]


@pytest.mark.parametrize("family", few_families([*CONFIGS, *PLAIN_MIXTURES]))
def test_which_families_can_be_refitted(family: str) -> None:
    architecture = describe(tiny_model(family))
    assert can_refit(architecture, channels=False) == bool(architecture.writers)
    assert can_refit(architecture, channels=True) == (family != "generic")
