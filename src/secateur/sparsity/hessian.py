"""The Hessian of the layer-wise squared error: damped, factorised, and used to measure outputs.

For ‖(W − Ŵ)X‖² every row of W has the same Hessian 2XXᵀ. The factor 2 cancels in all methods
here, so H = gram + damping · mean(diag(gram)) · I.

For a given mask, conjugate gradients find the least error for all rows at once. Targets may be the
dense model's outputs, fitted from the inputs of the pruned model.

Every function takes one matrix, or a batch of matrices of a size; each gets what it gets alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from secateur.errors import NumericalError
from secateur.machine import check_finite
from secateur.types import Gram, Mask, Weight

# L_jj² / H_jj is the share of column j that the other columns do not explain. Below these shares
# the subtraction that made the pivot has lost nearly all digits of the dtype: the factor is noise.
_SMALLEST_PIVOT = {torch.float32: 1e-5, torch.float64: 1e-12}
FACTOR_SQUARES = 4
"""Float32 matrices [in, in] that `inverse_factor` takes at most, besides the gram."""

_RECURSION_WIDTH = 256  # columns from which halving a triangular matrix is worth a call
_CHUNK_COLUMNS = 256  # columns whose products and checks are in memory at a time


def check_weight(weight: Weight) -> None:
    """Refuse a weight that is not finite.

    Raises:
        NumericalError: a weight is infinite or not a number.
    """
    if not torch.isfinite(weight).all():
        raise NumericalError(
            "the weight holds infinite values or NaN", remedy="check the checkpoint"
        )


def live_weight(
    weight: Weight, dead: Bool[Tensor, "*batch in"]
) -> Float32[Tensor, "*batch out in"]:
    """A float32 copy of a weight, zero in the dead columns: no input ever reaches them.

    Raises:
        NumericalError: a weight is infinite or not a number.
    """
    check_weight(weight)
    return weight.detach().float().masked_fill(dead[..., None, :], 0.0)


def damped_diagonal(
    gram: Gram, damping: float
) -> tuple[Float32[Tensor, "*batch in"], Bool[Tensor, "*batch in"]]:
    """The diagonal of H = gram + damping · mean(diag(gram)) · I, and the dead columns.

    Args:
        gram: float32 [in, in].
        damping: fraction of the mean diagonal added to the diagonal.

    Returns:
        diag(H), float32 [in], and the dead columns, bool [in]: inputs that were zero for every
        calibration token. They get H_jj = 1, as in SparseGPT, and touch no other column.

    Raises:
        NumericalError: the gram is not finite, or is zero everywhere.

    Example:
        >>> import torch
        >>> from secateur.sparsity.hessian import damped_diagonal
        >>> damped_diagonal(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 0.01)
        (tensor([2.0100, 1.0000]), tensor([False,  True]))
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    check_finite(diagonal)
    dead = diagonal == 0
    if dead.all(-1).any():
        raise NumericalError(
            "every calibration input of this linear is zero",
            remedy="give more calibration text if it is an expert that was never chosen; lower "
            "the sparsity if the layers before it have lost nearly all weights; or leave it out "
            "(--exclude)",
        )
    damped = diagonal + damping * diagonal.mean(-1, keepdim=True)
    return torch.where(dead, torch.ones_like(diagonal), damped), dead


def scaled_hessian(
    gram: Gram, damping: float
) -> tuple[
    Float32[Tensor, "*batch in in"], Float32[Tensor, "*batch in"], Bool[Tensor, "*batch in"]
]:
    """H / s sᵀ with s the roots of the diagonal of H, so that its diagonal is 1; s; dead columns.

    Args:
        gram: float32 [in, in].
        damping: fraction of the mean diagonal added to the diagonal.

    Raises:
        NumericalError: the gram is not finite, or is zero everywhere.
    """
    damped, dead = damped_diagonal(gram, damping)
    scale = damped.sqrt()
    # A dead column has s_j = 1 and stays a separate 1 on the diagonal.
    hessian = gram / scale[..., None, :]
    hessian /= scale[..., None]
    hessian.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return hessian, scale, dead


def inverse_factor(
    gram: Gram, damping: float
) -> tuple[Float32[Tensor, "*batch in in"], Bool[Tensor, "*batch in"]]:
    """The upper triangular U with UᵀU = H⁻¹, H = gram + damping · mean(diag(gram)) · I.

    SparseGPT factorises H, inverts it and factorises the inverse. The same U is the inverse of the
    upper triangular R with H = RRᵀ, which needs one factorisation and one triangular inverse. This
    is faster, and it never forms H⁻¹, the least accurate of the three.

    Memory, besides the gram: two matrices in the dtype of the work, so 2 squares of float32
    [in, in]; 4 where float32 is not enough and float64 has to be tried (`FACTOR_SQUARES`).

    Args:
        gram: float32 [in, in].
        damping: fraction of the mean diagonal added to the diagonal.

    Returns:
        U, float32 [in, in], and the dead columns, bool [in], as in `damped_diagonal`.

    Raises:
        NumericalError: the gram is not finite, is zero everywhere, or is not positive definite
            even in float64. A missing inverse is never replaced.
    """
    damped, dead = damped_diagonal(gram, damping)
    if gram.dim() > 2:
        factor = _factorise(gram, damped, torch.float32)
        if factor is None:  # each for itself, so that float64 is taken only where it must be
            factor = torch.stack([inverse_factor(each, damping)[0] for each in gram])
        return factor, dead
    factor = factorised(
        lambda dtype: _factorise(gram, damped, dtype),
        f"the gram of {len(gram)} inputs with damping {damping}",
    )
    return factor.float(), dead


def factorised(factorise: Callable[[torch.dtype], Tensor | None], what: str) -> Tensor:
    """A factor in float32, or in float64 where float32 is not precise enough.

    Args:
        factorise: makes the factor in a dtype; None if the dtype is not precise enough.
        what: the matrix, for the error.

    Raises:
        NumericalError: float64 is not precise enough either. No other method takes over.
    """
    for dtype in (torch.float32, torch.float64):
        factor = factorise(dtype)
        if factor is not None:
            return factor
    raise NumericalError(
        f"{what} is not positive definite",
        remedy="use more calibration tokens, or a larger damping (0.01 is usual, try 0.1)",
    )


def cholesky(hessian: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"] | None:
    """The lower triangular L with LLᵀ = H, or None if the dtype of H is not precise enough.

    Args:
        hessian: one or many symmetric matrices [..., n, n], float32 or float64.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    # L_jj² / H_jj of every matrix of the batch, [..., n].
    shares = lower.diagonal(dim1=-2, dim2=-1).square() / hessian.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not bool((shares > _SMALLEST_PIVOT[hessian.dtype]).all()):
        return None
    return lower


def _factorise(gram: Gram, damped: Tensor, dtype: torch.dtype) -> Tensor | None:
    """U with UᵀU = H⁻¹, or None if this precision is not enough."""
    # Lower and upper swap when rows and columns are reversed: JHJ = LLᵀ gives H = RRᵀ, R = JLJ.
    # Flipping copies, so what follows may work in place.
    hessian = gram.flip(-2, -1).to(dtype)
    hessian.diagonal(dim1=-2, dim2=-1).copy_(damped.flip(-1))
    lower = cholesky(hessian)
    del hessian  # two matrices are alive at a time, as FACTOR_SQUARES says
    if lower is None:
        return None
    upper = lower.flip(-2, -1)
    del lower
    _invert_upper(upper)
    # By rows, since a mask of the whole matrix would be a quarter of it again.
    finite = [torch.isfinite(rows).all() for rows in upper.split(_CHUNK_COLUMNS, dim=-2)]
    return upper if bool(torch.stack(finite).all()) else None


def _invert_upper(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves: nearly all work is in matmuls."""
    n = upper.shape[-1]
    if n <= _RECURSION_WIDTH:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    half = n // 2
    first, last = upper[..., :half, :half], upper[..., half:, half:]
    corner = upper[..., :half, half:]
    _invert_upper(first)
    _invert_upper(last)
    # [P Q; 0 R]⁻¹ = [P⁻¹ −P⁻¹QR⁻¹; 0 R⁻¹]
    corner.copy_((first @ corner @ last).neg_())


def output_energy(weight: Weight, gram: Gram) -> Float64[Tensor, "*batch"]:
    """‖WX‖² = tr(W · gram · Wᵀ), summed over all outputs and calibration tokens.

    The gram is symmetric, so only its upper half is multiplied.

    Args:
        weight: [out, in], any floating dtype; computed in float32, rows summed in float64.
        gram: float32 [in, in].

    Example:
        >>> import torch
        >>> from secateur.sparsity.hessian import output_energy
        >>> output_energy(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor(14., dtype=torch.float64)
    """
    weight = weight.detach().float()
    energy = weight.new_zeros(weight.shape[:-2], dtype=torch.float64)
    for start in range(0, weight.shape[-1], _CHUNK_COLUMNS):
        stop = start + _CHUNK_COLUMNS
        # Rows start:stop of the gram, from the diagonal block to the right: [out, in − start].
        product = weight[..., start:stop] @ gram[..., start:stop, start:]
        product *= weight[..., start:]
        product[..., _CHUNK_COLUMNS:] *= 2  # counts itself and its mirror image
        # Short sums in float32, the long one over rows in float64.
        energy += product.sum(-1).sum(-1, dtype=torch.float64)
    return energy


def relative_output_error(
    weight: Weight, new_weight: Weight, gram: Gram
) -> Float64[Tensor, "*batch"]:
    """‖(W − Ŵ)X‖² / ‖WX‖² on the calibration inputs; 0 if the outputs are all zero.

    Args:
        weight: W [out, in], any floating dtype.
        new_weight: Ŵ [out, in], any floating dtype.
        gram: float32 [in, in], without damping.

    Example:
        >>> import torch
        >>> from secateur.sparsity.hessian import relative_output_error
        >>> weight, gram = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> relative_output_error(weight, torch.tensor([[0.0, 2.0]]), gram)
        tensor(0.2000, dtype=torch.float64)
    """
    whole = output_energy(weight, gram)
    change = new_weight.detach().float() - weight.detach().float()
    # Rounding can make the energy of tiny numbers negative: hence the minimum and the condition.
    share = (output_energy(change, gram) / whole).clamp_min(0.0)
    return torch.where(whole > 0, share, 0.0)


_TINY = 1e-30  # keeps 0 / 0 at 0 for a row that is solved, or whose weights are all pruned


def fit_on_mask(start: Tensor, target: Tensor, hessian: Tensor, mask: Mask, steps: int) -> Tensor:
    """Approach argmin tr((X − B) A (X − B)ᵀ), X = 0 where pruned; rows that are solved do not move.

    Args:
        start: first X, float32 [..., out, in], zero where pruned; changed in place and returned.
        target: B A, float32 [..., out, in].
        hessian: A, float32 [..., in, in]; converges soonest where its diagonal is 1.
        mask: True = kept, bool [..., out, in].
        steps: of conjugate gradients.
    """
    # Every row is a system of its own, with its own step lengths [..., out, 1]. All share A, so a
    # step of all rows is one matmul. Masking residuals and images keeps a row within its support.
    x = start
    residual = (target - x @ hessian) * mask
    direction = residual.clone()
    energy = residual.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian) * mask
        # Step to the minimum along the direction: ‖r‖² / dᵀAd of each row.
        length = energy / (direction * image).sum(-1, keepdim=True).clamp_min_(_TINY)
        x.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        left = residual.square().sum(-1, keepdim=True)
        # Conjugate to all directions before, by the ratio of residuals (Fletcher and Reeves).
        direction = direction.mul_(left / energy.clamp_min(_TINY)).add_(residual)
        energy = left
    return x


def dense_target(
    gram: Gram,
    moments: Float32[Tensor, "*batch out in"],
    anchor: Float32[Tensor, "*batch out in"],
    damping: float,
) -> Float32[Tensor, "*batch out in"]:
    """The weight to prune, so that the outputs for inputs X̂ stay near the targets T.

    With G = X̂X̂ᵀ, M = TX̂ᵀ, λ = damping · mean(diag G) and an anchor A

        W* = (M + λA)(G + λI)⁻¹,    ‖T − ŴX̂‖² + λ‖A − Ŵ‖² = tr((Ŵ − W*)(G + λI)(Ŵ − W*)ᵀ) + rest

    where the rest does not depend on Ŵ. Every score and solver can use W* as the weight; its own
    damping then stands in place of λ on the right. Inputs X̂ in the pruned model differ from the
    inputs X of the dense one:

    * T = X, A = I gives a matrix K with W* = WK for T = WX, shared by linears with the same input;
    * T = WX + H − Ĥ, A = W is for a linear that writes to the residual stream, whose states before
      it are H in the dense and Ĥ in the pruned model: it then also corrects that difference.

    Paper: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
    Calibration", arXiv:2504.02692, which uses the first in the column sweep of quantization; here
    it is solved for at once, and pulled towards the anchor by the damping.

    Args:
        gram: G = X̂X̂ᵀ, float32 [in, in].
        moments: M = TX̂ᵀ, float32 [out, in].
        anchor: A, float32 [out, in], towards which the damping pulls.
        damping: fraction of the mean diagonal of the gram.

    Raises:
        NumericalError: the gram is not finite, or is zero everywhere.

    Example:
        >>> import torch
        >>> from secateur.sparsity.hessian import dense_target
        >>> weight, x, pruned_x = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1)
        >>> dense_target(pruned_x @ pruned_x.t(), weight @ x @ pruned_x.t(), weight, damping=0.0)
        tensor([[2.]])
    """
    # The diagonal of H − G: λ, and all of H_jj in a dead column, so that A is what remains there.
    damped, dead = damped_diagonal(gram, damping)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    shift = torch.where(dead, damped, damping * diagonal.mean(-1, keepdim=True))
    hessian = gram.clone()
    hessian.diagonal(dim1=-2, dim2=-1).copy_(damped)
    target = moments + anchor * shift[..., None, :]
    # W* H = target; H is symmetric, so H W*ᵀ = targetᵀ.
    lower = cholesky(hessian)
    if lower is not None:
        del hessian  # before the solution takes its memory
        solved: Tensor = torch.cholesky_solve(target.mT, lower)
    elif gram.dim() > 2:  # each for itself: the others are right by Cholesky
        parts = zip(gram, moments, anchor, strict=True)
        return torch.stack([dense_target(*each, damping) for each in parts])
    else:  # the least damping, of inputs that are nearly dependent
        solved = torch.linalg.solve(hessian, target.mT)
    return solved.mT.contiguous()
