"""The pretended device itself: what it refuses, and that faults planted in a part are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.sparsity.patterns.unstructured import Unstructured
from secateur.sparsity.solvers.zeroing import Zeroing


def planted_on_the_cpu(weight: Tensor) -> Tensor:
    return weight.abs() * torch.linspace(1, 2, weight.shape[1])


def planted_numpy(weight: Tensor) -> Tensor:
    return torch.from_numpy(abs(weight.numpy()))


def planted_mask(weight: Tensor) -> Tensor:
    mask = Unstructured().mask(weight.abs().cpu(), 0.5)  # left where it was made
    return Zeroing().solve(weight, None, mask).weight


def planted_result(weight: Tensor) -> Tensor:
    return weight.abs().cpu()


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (planted_on_the_cpu, RuntimeError, "same device"),
        (planted_numpy, RuntimeError, "numpy"),
        (planted_mask, RuntimeError, "same device"),
        (planted_result, AssertionError, "lies on the CPU"),
    ],
)
def test_planted_fault(
    fault: Callable[..., Tensor], error: type, said: str, both: Callable
) -> None:
    with pytest.raises(error, match=said):
        both(fault, torch.randn(6, 8))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda there, here: there + here,
    "add in place": lambda there, here: there.add_(here),
    "add here in place": lambda there, here: here.add_(there),
    "add a number of the CPU": lambda there, here: there + torch.tensor(2.0),
    "add to a number of cuda": lambda there, here: here + there.sum(),
    "matmul": lambda there, here: there @ here,
    "where": lambda there, here: torch.where(there > 0, there, here),
    "where, a number": lambda there, here: torch.where(there > 0, there, torch.tensor(0.0)),
    "concatenate": lambda there, here: torch.cat([there, here]),
    "copy there": lambda there, here: there.copy_(here),
    "copy here": lambda there, here: here.copy_(there),
    "fill": lambda there, here: there.masked_fill_(here > 0, 0.0),
    "gather": lambda there, here: there.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
    "index by the CPU": lambda there, here: there[torch.tensor([1, 0])],
    "addmm": lambda there, here: torch.addmm(there, there, here),
    "norm": lambda there, here: torch.linalg.vector_norm(there, dim=0) * here,
}


def refuses(operation: Callable[[Tensor, Tensor], object]) -> bool:
    there = torch.ones(4, 4, device="cuda")
    here = torch.ones(4, 4)
    try:
        operation(there, here)
    except (RuntimeError, torch._subclasses.fake_tensor.UnsupportedFakeTensorException) as error:
        assert "device" in str(error)  # noqa: PT017
        return True
    return False


@pytest.mark.parametrize("name", OPERATIONS)
def test_rule_is_that_of_fake_tensors(name: str) -> None:
    ours = refuses(OPERATIONS[name])
    with torch.utils._python_dispatch._disable_current_modes(), FakeTensorMode():
        assert refuses(OPERATIONS[name]) == ours
