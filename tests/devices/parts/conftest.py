"""Every test here runs on the pretended device; see `test_rehearsal.py`, which starts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretended import OnCuda, pretended_cuda, waits
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from contracts.conftest import make_example

NOT_RUNNABLE: dict[str, str] = {}
"""What cannot be rehearsed, by the id of its test, with the reason. An entry that has become
unnecessary fails."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.nodeid.split("/")[-1].split("::")[-1]
        if name in NOT_RUNNABLE:
            item.add_marker(pytest.mark.xfail(strict=True, reason=NOT_RUNNABLE[name]))


@pytest.fixture(autouse=True)
def on_pretended_cuda() -> Iterator[None]:
    torch.manual_seed(0)
    with pretended_cuda():
        yield


@pytest.fixture
def example() -> Any:
    return make_example


def to_cuda(value: Any) -> Any:
    """Tensors in a structure, moved."""
    return tree_map(lambda x: x.to("cuda") if isinstance(x, Tensor) else x, value)


def on_both(compute: Callable[..., Any], *arguments: Any, **near: float) -> None:
    """Compute from tensors of the CPU, then of cuda: results lie there too, and are the same."""
    expected = tree_leaves(compute(*tree_map(copied, arguments)))
    found = tree_leaves(compute(*to_cuda(arguments)))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if not isinstance(theirs, Tensor):
            is_number = isinstance(theirs, float)
            assert ours == (pytest.approx(theirs, rel=1e-3, abs=1e-5) if is_number else theirs)
            continue
        assert isinstance(ours, OnCuda), "the result lies on the CPU"
        torch.testing.assert_close(ours.cpu(), theirs, **near)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@pytest.fixture
def both() -> Any:
    return on_both


@pytest.fixture
def waited() -> list[str]:
    """What the host waited for since the test began."""
    waits.clear()
    return waits
