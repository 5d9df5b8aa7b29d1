"""Mixtures of experts, cut: the router follows, and tokens go where they went if it is left."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import close, odd
from same_logits import assert_same_logits
from slow import slow_but
from tiny import save_tiny
from zoo import PLAIN_MIXTURES, tiny_model, tiny_windows

from oracles.masking import switch_off
from secateur.errors import RecipeError
from secateur.models.skeleton import build_skeleton, quiet_transformers
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint, cut_model

CUTS: dict[str, Any] = {
    "experts": lambda sparse: Cut(experts=dict.fromkeys(sparse, (0, 2, 4))),
    "experts, differing": lambda sparse: Cut(experts={sparse[0]: (1, 2, 3)}),
    "without FFN": lambda sparse: Cut(neurons={sparse[0]: ()}),
    "everything": lambda sparse: Cut(
        layers=(1, 2), experts=dict.fromkeys(sparse, (1, 4)), groups={1: (0,)}, hidden=odd(32)
    ),
}


FEW = {"qwen2_moe": ("experts", "everything"), "qwen3_moe": ("without FFN", "everything")}
"""Of these the default tests make some cuts: they have a shared expert, or dense layers."""


def sparse_layers(model: Any) -> list[int]:
    return [i for i, count in enumerate(sizes_of(model).experts) if count]


def without_experts(model: Any, kept: Any) -> None:
    """The router gives others no chance: their logits are far below."""
    for i, experts in kept.items():
        router = model.model.layers[i].mlp.gate
        gone = [e for e in range(5) if e not in experts]

        def forward(x: torch.Tensor, router: Any = router, gone: Any = gone) -> Any:
            scores = x.reshape(-1, x.shape[-1]) @ router.weight.t()
            scores[:, gone] = -torch.inf
            chances = scores.softmax(-1)
            best, index = chances.topk(2, dim=-1)
            if getattr(router, "norm_topk_prob", True):
                best = best / best.sum(-1, keepdim=True)
            return scores, best, index

        router.forward = forward


@pytest.mark.parametrize(
    ("family", "name"),
    slow_but(
        [(family, name) for family in PLAIN_MIXTURES for name in FEW.get(family, CUTS)],
        product(PLAIN_MIXTURES, CUTS),
    ),
)
def test_cut_mixtures_equal_masked_ones(family: str, name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family, shards=2)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    windows = tiny_windows(2)
    cut = CUTS[name](sparse_layers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VariedSizesWarning)
        smaller = cut_model(model, cut)
        counted = cut_checkpoint(source, cut, tmp_path / "out")
        assert counted == accounting(model, cut) == accounting(build_skeleton(source), cut)
    parameters = list(smaller.parameters())
    assert counted.after.parameters == sum(p.numel() for p in parameters)
    differing = {"without FFN", "everything"}
    if len(sparse_layers(model)) > 1:
        differing.add("experts, differing")
    assert counted.varied == (name in differing)
    with quiet_transformers():
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    switch_off(
        model, family, layers=cut.layers, groups=cut.groups, neurons=cut.neurons, hidden=None
    )
    without_experts(model, cut.experts)
    with torch.no_grad():
        result = smaller(windows, use_cache=False).logits
        assert_same_logits(loaded.eval()(windows, use_cache=False).logits, result)
        if cut.hidden is None:
            assert close(result, model(windows, use_cache=False).logits)


def test_experts_that_are_stored_fused(tmp_path: Path) -> None:
    model: Any = tiny_model("mixtral")
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source", save_original_format=False)
    counted = cut_checkpoint(tmp_path / "source", Cut(experts=dict.fromkeys(range(3), (1, 3))),
                          tmp_path / "out")  # fmt: skip
    assert not counted.varied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 2
    with quiet_transformers():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = cut_model(model, Cut(experts=dict.fromkeys(range(3), (1, 3))))
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_fewer_experts_than_a_token_wants_are_refused() -> None:
    with pytest.raises(RecipeError, match="each token needs 2"):
        cut_model(tiny_model("mixtral"), Cut(experts={0: (1,)}))
