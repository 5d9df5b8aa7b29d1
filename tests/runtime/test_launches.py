"""How many launches a GPU gets for a product of integers, counted on tensors without numbers.

Shapes are those of Llama-3.1-8B. A launch is an operation of torch that makes or changes numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.runtime.kernels.linear import EXPANDED, IntegerLinear

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
HEAD = (128256, 4096)


class Launches(TorchDispatchMode):
    """Counts operations while it is entered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [x.alias_info for x in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def integers(shape: tuple[int, int], group: int | None) -> IntegerLinear:
    rows, columns = shape
    with torch.device("meta"):
        scales = torch.empty(rows) if group is None else torch.empty(rows, columns // group)
        return IntegerLinear(torch.empty(shape, dtype=torch.int8), scales, group)


@pytest.mark.parametrize("group", [None, 32, 64, 128], ids=str)
@pytest.mark.parametrize("tokens", [1, 2048])
def test_a_matrix_of_integers_takes_a_fixed_number(group: int | None, tokens: int) -> None:
    counts = set()
    for shape in SHAPES:
        linear = integers(shape, group)
        with Launches() as launches:
            y = linear(torch.empty(tokens, shape[1], dtype=torch.bfloat16, device="meta"))
        assert (y.shape, y.dtype) == ((tokens, shape[0]), torch.bfloat16)
        counts.add(launches.count)
    assert len(counts) == 1
    assert counts.pop() <= 18


def test_a_large_matrix_is_expanded_in_blocks() -> None:
    linear, x = integers(HEAD, 64), torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    with Launches() as launches:
        linear(x)
    blocks = -(-HEAD[0] * HEAD[1] // EXPANDED)
    assert launches.count <= 18 + 3 * blocks
