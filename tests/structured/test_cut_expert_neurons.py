"""Neurons removed inside the experts of every family, against zeros in the uncut model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import close, cut_on_disk, logits
from slow import slow_but
from zoo import WITH_EXPERTS, tiny_model, tiny_windows

from oracles.fused_experts import TAKEN, standard
from secateur.models.architecture import describe, text_config
from secateur.structured.cut import Cut, consumers, sizes_of
from secateur.structured.surgery import cut_model

FORMS = ("gpt_oss", "llama4", "deepseek_v3", "nemotron_h", "qwen2_moe", "minimax_m3")
IDS = tiny_windows(2, 9, seed=5)


def some(count: int, number: int, seed: int) -> tuple[int, ...]:
    """So many of the units, at random."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:number].tolist()))


def half_of(model: Any) -> Cut:
    """Half the neurons of all experts, others in each of them; and of shared experts."""
    sizes = sizes_of(model)
    return Cut(
        shared_neurons={i: some(n, n // 2, i) for i, n in enumerate(sizes.shared_neurons) if n},
        expert_neurons={
            i: tuple(some(n, n // 2, 10 * i + e) for e in range(sizes.experts[i]))
            for i, n in enumerate(sizes.expert_neurons)
            if n
        },
    )


@torch.no_grad()
def with_zeros(model: Any, family: str, cut: Cut) -> Any:
    """The uncut model, in which nothing reads the neurons that go."""
    layers, experts = describe(model).layers(model), describe(model).experts
    for i, each in cut.expert_neurons.items():
        fused = layers[i].get_submodule(experts.module)
        for e, kept in enumerate(each):
            down = TAKEN.get(family, standard)(fused, e)["down_proj"]
            down[:, [j for j in range(down.shape[1]) if j not in kept]] = 0
    for i, kept in cut.shared_neurons.items():
        down = layers[i].get_submodule(consumers(model)["shared_neurons"]).weight
        down[:, [j for j in range(down.shape[1]) if j not in kept]] = 0
    return model


@pytest.mark.parametrize("family", slow_but(FORMS, WITH_EXPERTS))
def test_neurons_are_removed_inside_each_expert(family: str, tmp_path: Path) -> None:
    """Plain transformers loads the result, which computes what the uncut one does without."""
    model: Any = tiny_model(family)
    cut = half_of(model)
    assert cut.expert_neurons
    counted, smaller = cut_on_disk(model, cut, tmp_path, varied="error")
    assert not counted.varied
    sizes, before = sizes_of(smaller), sizes_of(model)
    assert sizes.expert_neurons == tuple(n // 2 for n in before.expert_neurons)
    assert sizes.shared_neurons == tuple(n // 2 for n in before.shared_neurons)
    assert (sizes.experts, sizes.neurons) == (before.experts, before.neurons)
    config, experts = text_config(smaller.config), describe(model).experts
    assert getattr(config, experts.width) == max(sizes.expert_neurons)
    in_memory = logits(cut_model(model, cut), IDS)
    expected = logits(with_zeros(model, family, cut), IDS)
    assert close(in_memory, expected)
    assert close(logits(smaller.eval(), IDS), expected)
