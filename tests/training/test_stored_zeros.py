"""Zeros are held wherever they are stored, also where no linear shows them."""

from __future__ import annotations

import torch
from architectures import tiny_architecture
from zoo import tiny_windows

from secateur.training.masks import Masks


def test_zeros_of_experts_in_one_tensor_are_held() -> None:
    torch.manual_seed(0)
    model = tiny_architecture("deepseek_v3").bfloat16()
    weight = model.model.layers[1].mlp.experts.gate_up_proj
    with torch.no_grad():
        weight[:, :, ::2] = 0
    masks = Masks.of(model)
    assert set(masks.kept) == {"model.layers.1.mlp.experts.gate_up_proj"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tiny_windows(2, 12)
    before = weight.detach().clone()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        masks.hold_gradients(model)
        optimizer.step()
        masks.hold(model, optimizer)
        optimizer.zero_grad()
    masks.check(model, optimizer)
    assert not weight[:, :, ::2].any()
    assert not torch.equal(weight, before)
