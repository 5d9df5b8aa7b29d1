"""Chooses the damping of asymmetric fitting on tokens that the fit has not seen.

With G and M the moments of the fitted tokens, and G', M' those of the held-out ones,

    Ŵ_λ = the pruned W*_λ, W*_λ = (M + λW)(G + λI)⁻¹          `sparsity.dense_target`
    λ   = argmin  ‖T' − Ŵ_λX̂'‖² = tr(Ŵ_λ G' Ŵ_λᵀ) − 2 tr(Ŵ_λ M'ᵀ) + rest

A quarter of the tokens of each micro-batch is held out. Its moments say the error of any weights,
so each λ costs a solve and no forward. With the chosen λ the linear is solved once more, on all
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from secateur.engine.prune.group_statistics import GroupStatistics
from secateur.engine.prune.tasks import LinearTask
from secateur.models.architecture import Linear
from secateur.types import STORED

DAMPINGS = (0.05, 0.2, 0.8, 3.2)
"""The values that are tried, as fractions of the mean diagonal of the gram."""


def held_out_error(weight: Tensor, gram: Tensor, moments: Tensor) -> float:
    """‖T − WX‖² − ‖T‖² = tr(W G Wᵀ) − 2 tr(W Mᵀ).

    Args:
        weight: W, float32 [out, in].
        gram: G = XXᵀ, float32 [in, in].
        moments: M = TXᵀ, float32 [out, in].

    Example:
        >>> import torch
        >>> from secateur.engine.prune.held_out import held_out_error
        >>> held_out_error(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        -8.0
    """
    inner = (weight @ gram).sub_(moments, alpha=2.0)
    return float((inner * weight).sum())


def chosen_dampings(
    seen: GroupStatistics,
    linears: Sequence[Linear],
    tasks: Mapping[str, LinearTask],
    own: Callable[[Linear], Mapping[str, Tensor]],
    writer: bool,
) -> dict[str, float]:
    """Return the damping with the smallest held-out error for each linear of a group.

    Args:
        seen: the statistics of the group, with held-out tokens; not changed.
        linears: the linears that are solved.
        tasks: tasks of the linears, by name.
        own: returns the statistics of a linear's own gradients.
        writer: whether the targets are outputs of the only linear, not its dense inputs.
    """
    fit, held = copy.copy(seen), copy.deepcopy(seen.held)
    fit.held = None
    fit = copy.deepcopy(fit)  # `value` takes the place of the sums, which are needed again
    assert held is not None
    assert held.cross is not None
    shared, gram, cross = fit.value(), held.value()["gram"], held.cross.value()
    prepared = tasks[linears[0].name].method.solver.prepare(shared)
    found = {}
    for linear in linears:
        task = tasks[linear.name]
        known = {**shared, **own(linear), STORED: linear.weight}
        moments = cross if writer else linear.weight.float() @ cross
        errors = {}
        for damping in DAMPINGS:
            target = fit.fitted(writer, damping)(linear)
            solution = task.method.solve(target, prepared, known, task.sparsity)
            errors[damping] = held_out_error(solution.weight, gram, moments)
        found[linear.name] = min(errors, key=errors.__getitem__)
    return found
