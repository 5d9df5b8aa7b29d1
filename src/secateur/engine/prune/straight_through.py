"""Training on a grid: the forward sees rounded weights, the gradient goes straight through.

    ŵ = s · clamp(round(w / s), −largest, largest)
    ∂loss/∂w := ∂loss/∂ŵ   where |round(w / s)| ≤ largest, else 0

The optimizer moves w, in float32. A step smaller than the grid's is not lost: it adds up until w
rounds to the next integer. Beyond the ends of the grid w has no effect, so nothing moves it further
away. The scales s are held. Masks are not the business of this module: a weight that is zero rounds
to zero, and the sign of the zero says whether it is kept (`sparsity.rounding`).

Papers: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation", arXiv:1308.3432; Esser et al. 2020, "Learned Step Size Quantization",
arXiv:1902.08153, for the gradient beyond the ends, but s is not learned; for language models Liu et
al. 2023, "LLM-QAT", arXiv:2305.17888.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.architecture import Linear
from secateur.quantization.groups import GroupGrid
from secateur.sparsity.column_sweep import kept_weights, mark_kept


class StraightThrough(torch.autograd.Function):
    """Rounds in the forward; in the backward it is the identity within the grid, and 0 beyond."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: RoundedWeight) -> Tensor:
        """The rounded weight."""
        ctx.save_for_backward(weight)
        ctx.rounded = rounded
        return rounded.nearest(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rounded weight, without that of clipped weights."""
        (weight,) = ctx.saved_tensors
        return gradients[0].masked_fill(ctx.rounded.clipped(weight), 0.0), None


class RoundedWeight:
    """A matrix whose forwards see it rounded.

    Args:
        linear: the matrix. Its weights are on the grid; they define the scales.
        grid: the grid.
    """

    def __init__(self, linear: Linear, grid: GroupGrid) -> None:
        self.linear, self.grid = linear, grid
        _, scales = grid.quantize(linear.weight)
        self.scale = scales.values

    def nearest(self, weight: Tensor) -> Tensor:
        """A weight in the module's orientation, rounded with the scales."""
        if self.linear.transposed:
            return self.grid.nearest(weight.t(), self.scale).t()
        return self.grid.nearest(weight, self.scale)

    def clipped(self, weight: Tensor) -> Tensor:
        """Where a weight in the module's orientation lies beyond the ends of the grid, bool."""
        if self.linear.transposed:
            return self.grid.clipped(weight.t(), self.scale).t()
        return self.grid.clipped(weight, self.scale)

    @torch.no_grad()
    def settle(self) -> None:
        """Round the parameter itself."""
        parameter = self.linear.module.get_parameter("weight")
        kept = kept_weights(parameter)
        parameter.copy_(self.nearest(parameter))
        mark_kept(parameter, kept)

    @contextmanager
    def in_forwards(self) -> Iterator[None]:
        """Round in every forward of the module."""
        # A module finds its parameters in this dictionary, whatever it computes with them.
        module, found = self.linear.module, self.linear.module._parameters

        def enter(module: nn.Module, args: object) -> None:
            self.held = found["weight"]
            assert self.held is not None
            found["weight"] = StraightThrough.apply(self.held, self)

        def leave(module: nn.Module, args: object, output: object) -> None:
            found["weight"] = self.held

        hooks = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class RoundedWeights:
    """All matrices of a training that stay on their grids; a hook of the training loop.

    Args:
        weights: the matrices.
    """

    def __init__(self, weights: Iterable[RoundedWeight]) -> None:
        self.weights = list(weights)

    @contextmanager
    def in_forwards(self) -> Iterator[None]:
        """Round in every forward of the modules."""
        entered = [weight.in_forwards() for weight in self.weights]
        with ExitStack() as stack:
            for context in entered:
                stack.enter_context(context)
            yield

    def settle(self) -> None:
        """Round the parameters themselves."""
        for weight in self.weights:
            weight.settle()

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Round the parameters after the last step."""
        if step == steps:
            self.settle()

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: the scales belong to the model with which the training began."""
        return {}
