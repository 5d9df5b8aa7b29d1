"""The memory of a matrix is what the kernels' form of it takes."""

from __future__ import annotations

import pytest

from secateur.runtime.kernels.matrix import matrix_bytes
from secateur.runtime.random_models import random_matrix


@pytest.mark.parametrize("shape", [(64, 64), (63, 100), (192, 576)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4", "int3", "int2"])
def test_bytes_are_those_of_a_random_matrix(
    shape: tuple[int, int], sparsity: float, values: str
) -> None:
    short = {"bfloat16": "bf16", "int3": "int4", "int2": "int4"}.get(values, values)
    made = random_matrix(*shape, short, sparsity)
    group = 64 if short == "int4" else None
    # what kernels may read past the end is a few hundred bytes for each matrix
    found = matrix_bytes(shape, values, sparsity, group)
    chance = 0.03 * found if group and sparsity else 0  # which columns a pair of rows keeps
    assert found - chance <= made.nbytes <= found + chance + 400
