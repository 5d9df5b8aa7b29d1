"""(A + ρI)⁻¹ for many ρ from a few inverses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from jaxtyping import Float32
from torch import Tensor

from secateur.errors import NumericalError
from secateur.machine import add_product
from secateur.parallel.ranks import ALONE, Ranks
from secateur.sparsity.hessian import cholesky

_RECURSION_WIDTH = 256
# How far an inverse may be off, and in how many steps that is estimated. Of the inverses of a real
# model (SmolLM2-135M) the worst by halves is 0.006 off.
_OFF = 0.01
_STEPS = 6
_TINY = 1e-30
# Inputs from which halves are off too often to be tried first on a GPU. On a CPU they take three
# quarters of the time of Cholesky where they are right.
_NO_HALVES = 2048
# The largest error of a sum for an eigenvalue, the number of eigenvalues checked, and of ρ.
_PRECISION = 0.005
_EIGENVALUES = 400
_TRIED = 8


class ShiftedInverse:
    """(A + ρI)⁻¹ for any ρ in a range, each as a sum of a few that were computed.

    With the eigenvalues λ of A, a sum Σ cᵢ(ρ) (A + ρᵢI)⁻¹ is right to within the largest
    |1 − (λ + ρ) Σ cᵢ / (λ + ρᵢ)|. The cᵢ are the least-squares solution for λ spread over all that
    a matrix with unit diagonal can have, 0 to `in`; the ρᵢ lie at the Chebyshev points of the range
    of ln ρ, as few of them as make every sum right to within half a percent: 4 for a range of 15.
    The inverses are computed when one of them is first needed, and kept.

    Args:
        matrix: A, symmetric, positive semidefinite, with unit diagonal, float32 [in, in]; or a
            batch of such matrices.
        low: the smallest ρ.
        high: the largest ρ; equal to `low` for one inverse, which is then exact.
        ranks: the processes that compute the inverses. All need the same ones.
    """

    def __init__(
        self,
        matrix: Float32[Tensor, "*batch in in"],
        low: float,
        high: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self.matrix, self.ranks, self._inverses = matrix, ranks, list[Tensor]()
        # A unit diagonal bounds the eigenvalues by their sum, n. Far below ρ they act like 0.
        self.eigenvalues = math.log10(low) - 3, math.log10(max(matrix.shape[-1], high))
        self.shifts = _shifts(low, high, self.eigenvalues, _PRECISION)

    @property
    def inverses(self) -> list[Tensor]:
        """(A + ρᵢI)⁻¹, float32 [..., in, in] each.

        Raises:
            NumericalError: float32 cannot represent one of them.
        """
        if self._inverses:
            return self._inverses
        ranks, found = self.ranks, list[Tensor]()
        for i, shift in enumerate(self.shifts):
            own = i % ranks.count == ranks.rank
            found.append(inverse(self.matrix, shift) if own else torch.empty_like(self.matrix))
        for i, matrix in enumerate(found if ranks.count > 1 else []):
            ranks.share(matrix, i % ranks.count)
        self._inverses = found
        return found

    def at(
        self, shift: float, out: Tensor | None = None, only: Tensor | None = None
    ) -> Float32[Tensor, "*batch in in"]:
        """(A + ρI)⁻¹, float32 [..., in, in].

        Args:
            shift: ρ.
            out: written over and returned if given; a new tensor otherwise.
            only: the numbers of the matrices of a batch that are needed; None for all.
        """
        shares, _ = _shares(self.shifts, shift, self.eigenvalues)
        terms = (x if only is None else x[only] for x in self.inverses)
        total = torch.mul(next(terms), shares[0], out=out)
        for share, matrix in zip(shares[1:], terms, strict=True):
            total.add_(matrix, alpha=share)
        return total


# What follows depends on the size and the range of ρ alone, so the linears of a model share it.
@cache
def _shifts(
    low: float, high: float, eigenvalues: tuple[float, float], precision: float
) -> tuple[float, ...]:
    """The ρᵢ: as few as make the sums right for every ρ."""
    # One shift more until the worst of some ρ, spread evenly over ln ρ, is right.
    tried = [low * (high / low) ** (i / _TRIED) for i in range(_TRIED + 1)]
    shifts = _between(low, high, 1)
    while max(_shares(shifts, shift, eigenvalues)[1] for shift in tried) > precision:
        shifts = _between(low, high, len(shifts) + 1)
    return shifts


@cache
def _shares(
    shifts: tuple[float, ...], shift: float, eigenvalues: tuple[float, float]
) -> tuple[list[float], float]:
    """The cᵢ of a ρ, and how far the sum is off at worst; of λ, the logarithms of a range."""
    spread = torch.logspace(*eigenvalues, _EIGENVALUES, dtype=torch.float64)
    found_at = torch.cat([spread.new_zeros(1), spread])[:, None]  # 0, and all others
    # (λ + ρ) / (λ + ρᵢ), [eigenvalues, shifts]: with the right cᵢ a row adds up to 1.
    ratios = (found_at + shift) / (found_at + spread.new_tensor(shifts))
    # No cᵢ are right for every eigenvalue: they are the nearest, and the worst is checked.
    ones = torch.ones_like(found_at)
    found = torch.linalg.lstsq(ratios, ones).solution
    return found[:, 0].tolist(), float((ratios @ found - ones).abs().max())


def _between(low: float, high: float, count: int) -> tuple[float, ...]:
    """The Chebyshev points of a range, in the logarithm."""
    middle, half = math.log(low * high) / 2, math.log(high / low) / 2
    # Chebyshev points lie denser at the ends, where a sum of few terms errs most.
    angles = [(2 * i + 1) / (2 * count) * math.pi for i in range(count)]
    return tuple(math.exp(middle + half * math.cos(angle)) for angle in angles)


def inverse(
    matrix: Float32[Tensor, "*batch n n"], shift: float = 0.0
) -> Float32[Tensor, "*batch n n"]:
    """(A + ρI)⁻¹ of a symmetric positive semidefinite A, right to within one percent.

    The fastest way comes first, and its error is estimated: by halves, by Cholesky, by Cholesky in
    float64. The estimate may be ten times too small where errors have no common direction. Halves,
    where it decides, have one.
    Where one eigenvalue λ is far above the others, errors of A⁻¹ count λ-fold in A A⁻¹, and halves,
    which subtract such numbers, lose most. ‖(A + ρI)X − I‖₂ with ρ = 0.1 and λ = 0.9 n:

        n       halves    Cholesky    float64, rounded to float32
        300     0.009     1.6e-4      3.9e-5
        1024    0.078     5.5e-4      1.3e-4
        4096    1.1       3.4e-3      5.6e-4

    Args:
        matrix: A, float32 [n, n], or a batch of them; not changed.
        shift: ρ.

    Raises:
        NumericalError: A + ρI is not positive definite, or float32 cannot hold its inverse.
    """
    off = math.inf  # until an attempt ends
    precise = [partial(_by_cholesky, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    attempts: list[Callable[[Tensor, float], Tensor | None]] = [_by_halves, *precise]
    if matrix.shape[-1] >= _NO_HALVES and not matrix.is_cpu:
        del attempts[0]
    if matrix.dim() > 2:
        together = attempts[0](matrix, shift)
        if together is None:
            return torch.stack([inverse(each, shift) for each in matrix])
        for number, off in enumerate(_off(together, matrix, shift)):
            if off > _OFF:
                together[number] = inverse(matrix[number], shift)
        return together
    for attempt in attempts:
        found = attempt(matrix, shift)
        if found is None:
            continue
        (off,) = _off(found, matrix, shift)
        if off <= _OFF:
            return found
        del found  # before the next one takes its memory
    reason = "it is not positive definite" if off == math.inf else f"the best is {off:.1%} off"
    raise NumericalError(
        f"a scaled gram of {len(matrix)} inputs plus {shift:.3g} has no inverse in float32: "
        f"{reason}",
        remedy="use more calibration tokens, a larger rho or damping, or the method sparsegpt",
    )


def _shifted(matrix: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    """A + ρI, in memory of its own."""
    shifted = matrix.to(dtype, copy=True)
    # In place: the copy is ours.
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    return shifted


def _by_halves(matrix: Tensor, shift: float) -> Tensor | None:
    """The inverse with nearly all work in matmuls; NaN where a block is not positive definite."""
    return _halved(_shifted(matrix, shift, torch.float32))


def _by_cholesky(matrix: Tensor, shift: float, dtype: torch.dtype) -> Tensor | None:
    """The inverse, rounded to float32; None where a matrix is not positive definite."""
    lower = cholesky(_shifted(matrix, shift, dtype))
    if lower is None:
        return None
    found = torch.cholesky_inverse(lower)
    del lower  # before float64 becomes float32
    return found.float()


def _off(found: Tensor, matrix: Tensor, shift: float) -> list[float]:
    """‖E‖₂ of E = (A + ρI)X − I, estimated from below by power iteration on EᵀE; of each matrix."""
    start = torch.Generator().manual_seed(0)  # on the CPU: the same vector on every device
    vector = torch.randn(matrix.shape[-1], 1, generator=start).to(matrix.device)
    for _ in range(_STEPS):
        # Without the least divisor an E of 0 would become NaN.
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min_(_TINY)
        # E v, then Eᵀ(E v) as the next vector; X and A are symmetric.
        image = found @ vector
        error = matrix @ image + shift * image - vector
        vector = found @ (matrix @ error + shift * error) - error
    off = error.norm(dim=-2).nan_to_num(nan=math.inf)
    return off.flatten().tolist()  # one wait for all


def _halved(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix by halves.

    With A = [P Q; Qᵀ R] and S = R − QᵀP⁻¹Q, the blocks of A⁻¹ are P⁻¹ + P⁻¹Q S⁻¹ QᵀP⁻¹, −P⁻¹Q S⁻¹
    and S⁻¹. Nearly all work is in matmuls: 35 ms against 53 ms for `torch.cholesky_inverse` of
    1536 columns.
    """
    n = matrix.shape[-1]
    if n <= _RECURSION_WIDTH:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        lower.masked_fill_(failed[..., None, None] > 0, math.nan)  # without a wait
        return torch.cholesky_inverse(lower)
    half = n // 2
    # `upper` is P⁻¹ until the last update, `corner` is Q, `product` P⁻¹Q, `across` P⁻¹Q S⁻¹.
    found = torch.empty_like(matrix)
    upper, lower = found[..., :half, :half], found[..., half:, half:]
    upper.copy_(_halved(matrix[..., :half, :half]))
    corner = matrix[..., :half, half:]
    product = upper @ corner
    lower.copy_(matrix[..., half:, half:])
    lower.copy_(_halved(add_product(lower, corner.mT, product, alpha=-1)))
    across = product @ lower
    add_product(upper, across, product.mT)
    found[..., :half, half:] = across.neg_()
    found[..., half:, :half] = across.mT
    return found
