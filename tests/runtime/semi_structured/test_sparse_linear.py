"""Which way a linear takes, by a pretended clock; its products by references on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.runtime.kernels.gpu.linear import race
from secateur.runtime.semi_structured import load as module
from secateur.runtime.semi_structured.layout import (
    StoredParts,
    lifted,
    split,
    window_columns,
)
from secateur.runtime.semi_structured.load import SparseLinear, chosen_linear, measured

DENSE, CUTLASS, CUSPARSELT, TRITON = "dense", "CUTLASS", "cuSPARSELt", "Triton"


@dataclass(frozen=True)
class Reference:
    """A form on the CPU; like the product of a library, it does not know which tokens it gets."""

    weight: Tensor
    columns: Tensor | None
    nbytes: int

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(lifted(x, self.columns), self.weight, bias)


def reference(kernel: str, parts: StoredParts) -> Reference:
    if kernel == DENSE:
        return Reference(parts.dense, None, parts.dense.nbytes)
    return Reference(parts.wide, parts.columns, parts.nbytes)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways are there."""
    monkeypatch.setattr(module, "other_kernels", lambda: [CUTLASS, CUSPARSELT, TRITON])
    monkeypatch.setattr(module, "form", reference)


def example(name: str = "2:4") -> tuple[StoredParts, Tensor]:
    weight = torch.randn(32, 128).bfloat16()
    if name == "2:4":
        weight[:, 1::4] = weight[:, 2::4] = 0
        return StoredParts.of(weight, 128), weight
    weight.view(32, -1, 8)[..., :2] = 0
    return StoredParts.of(split(weight), 128, window_columns(128)), weight


def clock_of(*rounds: tuple[float, ...]) -> Callable[[Sequence[Any]], list[float]]:
    """A clock that tells prepared seconds: those of dense, CUTLASS and cuSPARSELt."""
    left = list(rounds)

    def clock(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
        seconds = left.pop(0)
        assert len(seconds) == len(calls)
        return list(seconds)

    return clock


MIXED = [
    (4, 9, 9, 2), (4, 9, 9, 3), (4, 5, 6), (4, 4.1, 4), (8, 5, 4.9), (16, 9, 8), (64, 40, 38),
]  # fmt: skip
"""Seconds for 1, 4, 16, 64, 256, 1024 and 4096 tokens; our kernel takes up to 4."""


@pytest.mark.usefixtures("on_the_cpu")
def test_the_kernel_depends_on_tokens() -> None:
    found = measured(example()[0], clock_of(*MIXED))
    assert found.kernels == {1: TRITON, 4: TRITON, 16: DENSE, 64: DENSE, 256: CUSPARSELT,
                          1024: CUSPARSELT, 4096: CUSPARSELT}  # fmt: skip
    kernels = [found.kernel(n) for n in (1, 3, 4, 5, 16, 255, 256, 700, 4096, 10**6)]
    assert kernels == [TRITON] * 3 + [DENSE] * 3 + [CUSPARSELT] * 4
    assert found.used == {DENSE, CUSPARSELT, TRITON}


@pytest.mark.usefixtures("on_the_cpu")
def test_hardly_faster_is_not_faster() -> None:
    found = measured(
        example()[0], clock_of(*[(1.0, 0.99, 0.98, 0.98)] * 2, *[(1.0, 0.99, 0.98)] * 5)
    )
    assert found.used == {DENSE}


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_every_way_is_the_dense_product(pattern: str) -> None:
    parts, weight = example(pattern)
    bias = torch.randn(32).bfloat16()
    found = chosen_linear(parts, bias, measured(parts, clock_of(*MIXED)))
    assert isinstance(found, SparseLinear)
    assert set(found.forms) == {DENSE, CUSPARSELT, TRITON}
    for shape in ((1, 128), (2, 3, 128), (300, 128), (0, 128)):
        x = torch.randn(shape).bfloat16()
        expected = x.double() @ weight.double().t() + bias.double()
        y = found(x)
        assert (y.shape, y.dtype) == (expected.shape, torch.bfloat16)
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=0.1)
    with pytest.raises(ShapeError, match="128"):
        found(torch.ones(1, 64).bfloat16())
    assert (found.weight.shape, found.weight.dtype) == ((32, 128), torch.bfloat16)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("seconds", "forms"),
    [
        ((1.0, 0.5, 0.6, 0.7), {CUTLASS}),
        ((1.0, 2.0, 0.6, 0.7), {CUSPARSELT}),
        ((1.0, 0.5, 0.6, 0.4), {CUTLASS, TRITON, DENSE}),  # between 4 tokens and 16 it is open
    ],
)
def test_only_what_is_used_is_held(seconds: Any, forms: set[str]) -> None:
    parts, weight = example("6:8")
    clock = clock_of(*[seconds] * 2, *[seconds[:3]] * 5)
    found = chosen_linear(parts, None, measured(parts, clock))
    assert isinstance(found, SparseLinear)
    assert set(found.forms) == forms
    assert found.nbytes == parts.nbytes + (DENSE in forms) * weight.nbytes


@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_never_faster_becomes_dense() -> None:
    parts, weight = example("6:8")
    found = chosen_linear(
        parts,
        torch.ones(32).bfloat16(),
        measured(parts, clock_of(*[(1, 2, 3, 4)] * 2, *[(1, 2, 3)] * 5)),
    )
    assert type(found) is nn.Linear
    assert torch.equal(found.weight, weight)


def test_what_a_gpu_refuses_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own 2:4 product, which no CPU has."""
    monkeypatch.setattr(module, "other_kernels", lambda: [CUTLASS])
    parts, _ = example()
    found = measured(parts, clock_of(*[(1.0,)] * 7))
    assert found.used == {DENSE}

    def lost(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(module.functional, "linear", lost)
    with pytest.raises(torch.OutOfMemoryError):
        measured(parts, clock_of())


def test_the_usual_way_must_run() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        race((1,), "usual", lambda tokens: {"usual": fails}, clock_of())
    seconds = race((1,), "usual", lambda tokens: {"usual": int, "other": fails}, clock_of((1,)))
    assert seconds == {1: {"usual": 1}}
