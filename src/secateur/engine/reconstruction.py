"""After a layer is pruned, what is left of it is tuned to give the outputs of the dense layer.

The inputs are those of the pruned model, the targets are the outputs that the dense model has at
this place, so a layer also makes up for what the layers before it lost. All parameters of the
layer move, norms and biases too; pruned weights stay zero; nothing is added. One decoder layer is
in memory, with its gradients and the two moments of Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.calls import LayerCall, call_layer
from secateur.errors import RecipeError
from secateur.models.architecture import Linear

__all__ = ["Reconstruction", "output_error", "reconstruct"]


@dataclass(frozen=True)
class Reconstruction:
    """Adam on the parameters θ of a pruned decoder layer f, mask held:

        minimise over θ   mean_t ‖f_θ(x̂)_t − y_t‖² / ‖y_t‖²

    where t runs over the tokens of a step, x̂ are the layer's inputs in the pruned model and y the
    dense layer's outputs on the dense inputs. Each token counts by its own size because the norms
    that follow divide by it: a few tokens have hidden states a thousand times larger than the
    others, and would otherwise be all that is fitted.

    The learning rate falls from `learning_rate` to 0 along a half cosine over all steps.

    After: block-wise reconstruction as in BRECQ (Li et al. 2021, arXiv:2102.05426), used for
    pruned language models by Wanda++ (Yang et al. 2025, arXiv:2503.04992), among others.

    Args:
        passes: over the calibration windows; 0 tunes nothing.
        learning_rate: of the first step.

    Raises:
        RecipeError: a number is out of range.
    """

    passes: int = 3
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise RecipeError(f"passes is {self.passes}", remedy="give 0 or more; 3 is usual")
        if not 0 < self.learning_rate < 1:
            raise RecipeError(
                f"learning_rate is {self.learning_rate}", remedy="give a small number such as 1e-3"
            )

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def output_error(output: Tensor, target: Tensor) -> Tensor:
    """mean_t ‖output_t − target_t‖² / ‖target_t‖², a scalar, over all tokens t.

    Args:
        output: [..., hidden], any floating dtype; computed in float32.
        target: the same shape.
    """
    target = target.float()
    error = (output.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def reconstruct(
    layer: nn.Module,
    pruned: Iterable[Linear],
    windows: int,
    example: Callable[[int], tuple[Tensor, Tensor]],
    call: LayerCall,
    how: Reconstruction,
    seed: int,
    tell: Callable[[], None],
) -> None:
    """Tune a pruned decoder layer in place.

    Args:
        layer: with its pruned weights; computed in float32 whatever its dtype.
        pruned: the linears whose zeros are held.
        windows: number of calibration windows.
        example: gives inputs and target of one window, each [1, sequence_length, hidden].
        call: how the layer is called for one window.
        how: passes and learning rate.
        seed: of the order of the windows.
        tell: called after every step.
    """
    parameters = [p for p in layer.parameters() if p.is_floating_point()]
    before = [(p.dtype, p.requires_grad) for p in parameters]
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)
    held = [
        (linear.module.get_parameter("weight"), linear.module.get_parameter("weight") != 0)
        for linear in pruned
    ]
    optimizer = torch.optim.Adam(parameters, lr=how.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    call = call.to(parameters[0].device, torch.float32)
    order = torch.cat([torch.randperm(windows, generator=draw) for _ in range(how.passes)])
    try:
        for step, window in enumerate(order.tolist()):
            inputs, target = example(window)
            for group in optimizer.param_groups:
                group["lr"] = how.rate(step, len(order))
            with torch.enable_grad():
                output_error(call_layer(layer, inputs.float(), call), target).backward()
            for weight, mask in held:
                assert weight.grad is not None
                weight.grad *= mask  # its moments stay zero, and so does a pruned weight
            optimizer.step()
            optimizer.zero_grad()
            tell()
    finally:
        for p, (dtype, wanted_gradient) in zip(parameters, before, strict=True):
            p.requires_grad_(wanted_gradient)
            p.grad = None
            p.data = p.data.to(dtype)
