"""Every family, pruned layer by layer, against the plainest way to do the same."""

from __future__ import annotations

import pytest
import torch
from slow import few_families
from torch import nn
from zoo import CONFIGS, matrices, tiny_model, tiny_windows, weight_of

import secateur
from oracles.mixtures import inputs_of
from secateur.engine.stream.calls import find_groups
from secateur.models.architecture import describe, linears_of


def wanda_by_hand(model: nn.Module, windows: torch.Tensor, sparsity: float, by_group: bool) -> None:
    """Wanda in float64, one whole-model forward per step, rows sorted one at a time."""
    architecture = describe(model)
    for index in range(len(architecture.layers(model))):
        prefix = architecture.layer_name(index)
        names = [n for n in matrices(model) if n.startswith(prefix + ".")]
        groups = architecture.groups or [[n.removeprefix(prefix + ".")] for n in names]
        if architecture.groups is None:
            found = inputs_of(model, names, windows)
            unique: dict[tuple, list[str]] = {}
            for n in names:
                key = tuple(found[n].flatten()[:7].tolist())
                unique.setdefault(key, []).append(n.removeprefix(prefix + "."))
            groups = list(unique.values())
        steps = groups if by_group else [[n for g in groups for n in g]]
        for step in steps:
            full = [f"{prefix}.{n}" for n in step]
            seen = inputs_of(model, full, windows)
            for name in full:
                weight = weight_of(dict(model.named_modules())[name])
                norm = seen[name].double().square().sum(0).sqrt()
                count = round(sparsity * weight.shape[1])
                for row in weight:
                    order = torch.argsort(row.double().abs() * norm, stable=True)
                    row[order[:count]] = 0


@pytest.mark.parametrize("family", few_families(CONFIGS))
@pytest.mark.parametrize("sequential", ["group", "layer"])
def test_wanda_equals_plain_forwards(family: str, sequential: str) -> None:
    windows = tiny_windows()
    ours, plain = tiny_model(family), tiny_model(family)
    secateur.prune(
        ours,
        method="wanda",
        sparsity=0.5,
        calibration=windows,
        sequential=sequential,
        micro_batch_tokens=40,
    )
    wanda_by_hand(plain, windows, 0.5, by_group=sequential == "group")
    expected = matrices(plain)
    for name, module in matrices(ours).items():
        assert torch.equal(module.weight, expected[name].weight), name
    assert all((module.weight == 0).float().mean() == 0.5 for module in expected.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_declared_groups_are_those_that_share_an_input(family: str) -> None:
    model = tiny_model(family)
    architecture = describe(model)
    assert architecture.family == family
    layer = architecture.layers(model)[0]
    linears = linears_of(layer, "")
    hidden = torch.randn(1, 5, 32)
    names = {id(x.module): n for n, x in linears.items()}
    kwargs = {}
    if hasattr(model, "model") and hasattr(model.model, "rotary_emb"):
        rotary = model.model.rotary_emb
        position = torch.arange(5)[None]
        extra = ("full_attention",) if family == "gemma3" else ()
        kwargs["position_embeddings"] = rotary(hidden, position, *extra)
    elif family == "gpt_neox":
        kwargs["position_embeddings"] = model.gpt_neox.rotary_emb(hidden, torch.arange(5)[None])
    with torch.no_grad():
        found = find_groups(list(linears.values()), lambda: layer(hidden, **kwargs))
    found_names = {frozenset(names[id(x.module)] for x in group) for group in found}
    assert set().union(*found_names) == set(linears)
    if architecture.groups is not None:
        assert found_names == {frozenset(group) for group in architecture.groups}
