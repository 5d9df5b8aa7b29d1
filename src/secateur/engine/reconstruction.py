"""After a layer is pruned, what is left of it is tuned to give the outputs of the dense layer.

The inputs are those of the pruned model, the targets are the outputs that the dense model has at
this place, so a layer also makes up for what the layers before it lost. All parameters of the
layer move, norms and biases too; pruned weights stay zero; nothing is added. One decoder layer is
in memory, with its gradients and the two moments of Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.calls import LayerCall, call_layer
from secateur.engine.precision import fast_matmuls
from secateur.errors import RecipeError
from secateur.models.architecture import Linear

__all__ = ["Reconstruction", "draw_steps", "output_error", "reconstruct"]


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


def draw_steps(windows: int, size: int, passes: int, seed: int) -> list[list[int]]:
    """The windows of every step: each pass sees all of them once, in an order of its own.

    Args:
        windows: how many there are.
        size: windows in a step; the last step of a pass may have fewer.
        passes: over all windows.
        seed: of the orders.
    """
    draw = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(passes):
        order = torch.randperm(windows, generator=draw).tolist()
        steps += [order[i : i + size] for i in range(0, windows, size)]
    return steps


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
    steps: Sequence[Sequence[int]],
    example: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    call: Callable[[int], LayerCall],
    how: Reconstruction,
    tell: Callable[[], None],
) -> None:
    """Tune a pruned decoder layer in place.

    Args:
        layer: with its pruned weights; tuned in float32 whatever its dtype.
        pruned: the linears whose zeros are held.
        steps: the calibration windows of each step.
        example: gives inputs and target of some windows, each [windows, sequence_length, hidden].
        call: how the layer is called for so many windows.
        how: gives the learning rate.
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
    optimizer = torch.optim.Adam(parameters, lr=how.learning_rate, fused=True)
    device = parameters[0].device
    calls = {size: call(size).to(device, torch.float32) for size in {len(x) for x in steps}}
    try:
        for step, windows in enumerate(steps):
            inputs, target = example(windows)
            for group in optimizer.param_groups:
                group["lr"] = how.rate(step, len(steps))
            with torch.enable_grad(), fast_matmuls(device):
                output = call_layer(layer, inputs.float(), calls[len(windows)])
                output_error(output, target).backward()
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
