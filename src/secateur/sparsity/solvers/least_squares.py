"""Least squares: computes the best remaining weights for a given mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from secateur.registry import NonNegative, float32_bytes
from secateur.sparsity.hessian import cholesky, damped_diagonal, factorised, live_weight
from secateur.sparsity.solvers import Solution, SolverDefaults, solvers
from secateur.types import Gram, Mask, Statistics, Weight

# Entries of the systems that are gathered and factorised together: 64 MiB in float32.
_CHUNK_ENTRIES = 2**24


class PreparedHessian(NamedTuple):
    """The prepared data of an input; each support has its own factorisation.

    Attributes:
        diagonal: that of the damped H, float32 [in].
        dead: inputs that were zero for every token, bool [in].
        gram: all of H except its diagonal, float32 [in, in]; not copied.
    """

    diagonal: Float32[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    gram: Gram


@solvers.register("least-squares")
@dataclass(frozen=True)
class LeastSquares(SolverDefaults):
    """The exact minimiser of ‖(W − Ŵ)X‖² + λ‖W − Ŵ‖² among all Ŵ with these zeros.

    With H = gram + λI, λ = damping · mean(diag(gram)), a row w, its kept columns S and its pruned
    columns P, so that d = w on P and 0 on S:

        ŵ_S = w_S + H_SS⁻¹ (Hd)_S.

    With any damping, ‖(W − Ŵ)X‖² is no larger than with the pruned weights set to zero, since both
    have the same ‖W − Ŵ‖² on P, and only zeroing has none on S. Rows with the same zeros share a
    factorisation. The weights of dead columns become zero, as in the solver `obs`.

    The normal equations are as old as least squares; as the last step of one-shot pruning they are
    in Boža 2024, "Fast and Effective Weight Update for Pruned Large Language Models",
    arXiv:2401.02938, who finds the inverses too costly for large models and takes ADMM.

    Args:
        damping: fraction of the mean diagonal of the gram added to its diagonal.

    Raises:
        RecipeError: the damping is negative or no number.

    Example:
        >>> import torch
        >>> from secateur.sparsity.solvers.least_squares import LeastSquares
        >>> solver, mask = LeastSquares(damping=0.0), torch.tensor([[False, True]])
        >>> prepared = solver.prepare({"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
        >>> solver.solve(torch.tensor([[1.0, 1.0]]), prepared, mask).weight
        tensor([[0.0000, 1.5000]])
    """

    damping: NonNegative = 0.01
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})

    def prepare(self, statistics: Statistics) -> PreparedHessian:
        """Damp the `gram`, float32 [in, in].

        Raises:
            NumericalError: the gram is not finite, or zero everywhere.
        """
        gram = statistics["gram"]
        return PreparedHessian(*damped_diagonal(gram, self.damping), gram)

    def solve(self, weight: Weight, prepared: PreparedHessian, mask: Mask) -> Solution:
        """Refit one weight [out, in] of any floating dtype; computed in float32.

        Raises:
            NumericalError: a weight is infinite or not a number, or H_SS is not positive definite
                even in float64.
        """
        dense = live_weight(weight, prepared.dead)
        # (Hd)_S: d is 0 on S, so no entry of H's diagonal counts, and the gram needs no damping.
        pull = dense.masked_fill(mask, 0.0) @ prepared.gram
        solved = dense.masked_fill(~mask, 0.0)
        for systems in _systems(mask):
            change = systems.solve(pull, prepared)
            rows, columns = systems.rows[:, None], systems.columns[systems.member]
            solved[rows, columns] += change
        return Solution.measured(weight, solved, mask, prepared.gram)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Five float32 copies of the weight, and the systems of a chunk (`systems_bytes`)."""
        return 5 * float32_bytes(shape) + systems_bytes(*shape)


def systems_bytes(rows: int, columns: int) -> int:
    """What solving for a weight [rows, columns] takes at most, besides the gram.

    That is five times the entries of a chunk: in float64 the systems with their factors, then the
    factors with right sides and solutions.
    """
    largest_support = columns * (columns + rows)
    return 5 * 4 * max(min(_CHUNK_ENTRIES, rows * largest_support), largest_support)


class _Systems(NamedTuple):
    """Some distinct supports, padded to the size of the largest, and the rows that have them.

    Attributes:
        columns: int64 [supports, size], the kept columns, then some that are pruned.
        valid: bool [supports, size], False for those that are pruned.
        rows: int64 [rows], the rows with one of these supports.
        member: int64 [rows], which support each has.
        slot: int64 [rows], its place among the rows with the same support.
    """

    columns: Tensor
    valid: Tensor
    rows: Tensor
    member: Tensor
    slot: Tensor

    def solve(self, pull: Tensor, prepared: PreparedHessian) -> Tensor:
        """H_SS⁻¹ (Hd)_S of every row, float32 [rows, size], zero where padded."""
        # One right side for each row with the support: [supports, size, most rows of a support].
        right = pull.new_zeros(*self.columns.shape, int(self.slot.max()) + 1)
        right[self.member, :, self.slot] = pull[self.rows].gather(1, self.columns[self.member])
        right *= self.valid[:, :, None]
        lower = factorised(
            lambda dtype: cholesky(self._hessians(prepared).to(dtype)),
            "the gram of the inputs that are kept",
        )
        change = torch.cholesky_solve(right.to(lower.dtype), lower).float()
        return change[self.member, :, self.slot]

    def _hessians(self, prepared: PreparedHessian) -> Tensor:
        """H_SS of every support; the padding is an identity apart from the rest."""
        # Entry [s, a, b] is H at the a-th and b-th kept column of support s.
        hessians = prepared.gram[self.columns[:, :, None], self.columns[:, None, :]]
        # Rows and columns of the padding become 0, then its diagonal 1: it solves to 0.
        hessians *= self.valid[:, :, None]
        hessians *= self.valid[:, None, :]
        diagonal = prepared.diagonal[self.columns].masked_fill_(~self.valid, 1.0)
        hessians.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return hessians


def _systems(mask: Tensor) -> Iterator[_Systems]:
    """The supports of all rows, the largest first, in chunks of nearly the same size."""
    supports, support_of_row = mask.unique(dim=0, return_inverse=True)
    # Largest first: the first support of a chunk sets its size, and padding stays small.
    sizes, order = supports.sum(1).sort(descending=True, stable=True)
    # Rows in the order of their supports, so that a chunk of supports is a range of rows.
    rank, rows = order.argsort()[support_of_row].sort(stable=True)
    shared = torch.bincount(rank)  # rows of each support, in the order of sizes
    first = torch.cat([shared.new_zeros(1), shared.cumsum(0)])
    start, most_shared = 0, int(shared.max())
    while start < len(supports) and (size := int(sizes[start])):  # a support of none has no system
        stop = start + max(1, _CHUNK_ENTRIES // (size * (size + most_shared)))
        stop = min(stop, len(supports))
        chunk_rows = slice(int(first[start]), int(first[stop]))
        # A stable sort of bools lists the kept columns in their order, then the others.
        kept_first = supports[order[start:stop]].sort(dim=1, descending=True, stable=True)
        member = rank[chunk_rows]
        yield _Systems(
            columns=kept_first.indices[:, :size],
            valid=kept_first.values[:, :size],
            rows=rows[chunk_rows],
            member=member - start,
            slot=torch.arange(chunk_rows.start, chunk_rows.stop, device=mask.device)
            - first[member],
        )
        start = stop
