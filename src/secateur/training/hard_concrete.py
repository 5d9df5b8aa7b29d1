"""Hard concrete gates: they can be exactly 0 or 1 and still have gradients."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import RecipeError

_TEMPERATURE = 2 / 3
_LOW, _HIGH = -0.1, 1.1
_START = 3.0


class HardConcrete(nn.Module):
    """z = clamp(s · (ζ − γ) + γ, 0, 1),  s = σ((log u − log(1 − u) + log α) / β),  u uniform.

        P(z ≠ 0) = σ(log α − β log(−γ / ζ))               β = 2/3, γ = −0.1, ζ = 1.1
        P(z = 1) = σ(log α − β log((1 − γ) / (ζ − 1)))

    Gates begin at log α = 3, where P(z ≠ 0) = 0.990 and P(z = 1) = 0.802.

    Paper: Louizos et al. 2018, "Learning Sparse Neural Networks through L₀ Regularization",
    arXiv:1712.01312.

    Args:
        units: number of gates.
        target: number of gates that stay open at the end.
        device: where the gates are.

    Raises:
        RecipeError: the target is not between 1 and the number of gates.
    """

    def __init__(self, units: int, target: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not 1 <= target <= units:
            raise RecipeError(
                f"the target keeps {target} of {units} units", remedy=f"give 1 to {units}"
            )
        self.units, self.target = units, target
        self.log_alpha = nn.Parameter(torch.full((units,), _START, device=device))

    def sample(self, random: torch.Generator) -> Float[Tensor, " units"]:
        """Draw the gates of one forward independently.

        Args:
            random: a generator on the CPU, so that the draws are the same on every device.
        """
        tiny = torch.finfo(torch.float32).eps
        u = torch.rand(self.units, generator=random).clamp_(tiny, 1 - tiny)
        u = u.to(self.log_alpha.device)
        s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / _TEMPERATURE)
        return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def open_share(self) -> Float[Tensor, ""]:
        """The expected share of gates that are not 0; a scalar."""
        return torch.sigmoid(self.log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).mean()

    def kept(self) -> tuple[int, ...]:
        """The `target` units that are open most often, ascending. Ties go to the later unit."""
        return tuple(self._kept_units().tolist())

    def settled(self) -> Float[Tensor, " units"]:
        """Return 1 for the kept units and 0 for the others. This never waits for a GPU."""
        return torch.zeros_like(self.log_alpha).index_fill_(0, self._kept_units(), 1.0)

    @torch.no_grad()
    def _kept_units(self) -> Int64[Tensor, " target"]:
        """Return the indices in ascending order. The sort is stable; `topk` orders ties freely."""
        return self.log_alpha.argsort(stable=True)[self.units - self.target :].sort().values
