"""Training on a grid: gradients, and kept weights that round to 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.engine.prune.reconstruction import RoundedWeight
from secateur.models.architecture import Linear
from secateur.quantization.groups import GroupGrid
from secateur.sparsity.column_sweep import kept_weights


def rounded_weight(kind: str) -> tuple[RoundedWeight, nn.Parameter, torch.Tensor]:
    """A matrix [6, 80] on a grid, its parameter, and the scale of each weight."""
    module = nn.Linear(80, 6, bias=False) if kind == "linear" else Conv1D(6, 80)
    linear, grid = Linear("x", module), GroupGrid(3, 32)
    generator = torch.Generator().manual_seed(0)
    codes, scales = grid.quantize(torch.randn(6, 80, generator=generator))
    linear.assign(grid.dequantize(codes, scales))
    rounded = RoundedWeight(linear, grid)
    return rounded, module.weight, rounded.scale.repeat_interleave(32, 1)[:, :80]


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_the_gradient_passes_within_the_grid_and_stops_beyond(kind: str) -> None:
    rounded, parameter, scale = rounded_weight(kind)
    generator = torch.Generator().manual_seed(1)
    latent = scale * torch.empty(6, 80).uniform_(-5, 5, generator=generator)
    rounded.linear.assign(latent)
    x = torch.randn(4, 80, generator=generator)
    with rounded.in_forwards():
        rounded.linear.module(x).square().sum().backward()
    seen = (latent / scale).round().clamp(-4, 3) * scale
    wanted = 2 * (x @ seen.t()).t() @ x
    within = (latent / scale).round() == (latent / scale).round().clamp(-4, 3)
    assert 0.2 < within.float().mean() < 0.9
    found = parameter.grad if kind == "linear" else parameter.grad.t()
    torch.testing.assert_close(found, wanted * within, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_what_rounds_to_zero_stays_known_as_kept(kind: str) -> None:
    rounded, _, scale = rounded_weight(kind)
    latent = scale * torch.empty(6, 80).uniform_(-3, 3, generator=torch.Generator().manual_seed(2))
    latent[:, ::2] = 0.0
    rounded.linear.assign(latent)
    rounded.settle()
    weight = rounded.linear.weight
    assert (weight[:, 1::2] == 0).any()
    assert torch.equal(kept_weights(weight), latent != 0)
    assert torch.equal(kept_weights(weight.bfloat16()), latent != 0)


def test_a_stopped_forward_leaves_the_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, parameter, _ = rounded_weight("linear")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.functional, "linear", stop)
    with pytest.raises(KeyboardInterrupt), rounded.in_forwards():
        rounded.linear.module(torch.zeros(1, 80))
    assert rounded.linear.module.weight is parameter
