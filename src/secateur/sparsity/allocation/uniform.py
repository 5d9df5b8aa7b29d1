"""Uniform: every linear gets the target sparsity."""

from collections.abc import Mapping

from secateur.sparsity.allocation import allocation
from secateur.sparsity.allocation.budget import Granularity


@allocation
def uniform(grains: Mapping[str, Granularity], sparsity: float) -> dict[str, float]:
    """s_i = s for every linear i; observes nothing of the model.

    Example:
        >>> from secateur.sparsity.allocation.budget import Granularity
        >>> from secateur.sparsity.allocation.uniform import uniform
        >>> uniform({"q_proj": Granularity.around((4, 8), 1, 16, 0.5, 0.0)}, 0.5)
        {'q_proj': 0.5}
    """
    return dict.fromkeys(grains, sparsity)
