"""Which way a linear takes, by a pretended clock; its products by references on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ShapeError
from secateur.runtime.semi_structured import linear as module
from secateur.runtime.semi_structured.layout import Parts
from secateur.runtime.semi_structured.linear import SparseLinear, chosen_linear, measured
from secateur.runtime.semi_structured.splitting import SPLITTINGS

DENSE, CUTLASS, CUSPARSELT = "dense", "CUTLASS", "cuSPARSELt"


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries are there, and multiply the decoded wide matrix."""
    monkeypatch.setattr(module, "libraries", lambda: (CUTLASS, CUSPARSELT))
    monkeypatch.setattr(
        module, "form", lambda way, parts: parts.dense if way == DENSE else parts.wide
    )


def example(name: str = "2:4") -> tuple[Parts, Tensor]:
    weight = torch.randn(32, 128).bfloat16()
    if name == "2:4":
        weight[:, 1::4] = weight[:, 2::4] = 0
        return Parts.of(weight, 128), weight
    splitting = next(one for one in SPLITTINGS if one.name == name)
    weight.view(32, -1, splitting.m)[..., : splitting.m - splitting.n] = 0
    return Parts.of(splitting.split(weight), 128, splitting.columns(128)), weight


def clock_of(*rounds: tuple[float, ...]) -> Callable[[Sequence[Any]], list[float]]:
    """A clock that tells prepared seconds: those of dense, CUTLASS and cuSPARSELt."""
    left = list(rounds)

    def clock(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
        told = left.pop(0)
        assert len(told) == len(calls)
        return list(told)

    return clock


FEW_DENSE = [(1, 9, 9), (1, 5, 6), (2, 2.1, 2), (4, 3, 3.1), (8, 5, 4), (32, 20, 19)]


@pytest.mark.usefixtures("on_the_cpu")
def test_the_way_depends_on_tokens() -> None:
    found = measured(example()[0], clock_of(*FEW_DENSE))
    assert found.ways == {1: DENSE, 16: DENSE, 64: DENSE, 256: CUSPARSELT, 1024: CUSPARSELT,
                          4096: CUSPARSELT}  # fmt: skip
    ways = {n: found.way(n) for n in (1, 7, 64, 65, 255, 256, 700, 4096, 10**6)}
    assert [n for n, way in ways.items() if way == CUSPARSELT] == [256, 700, 4096, 10**6]
    assert found.used == {DENSE, CUSPARSELT}


@pytest.mark.usefixtures("on_the_cpu")
def test_hardly_faster_is_not_faster() -> None:
    found = measured(example()[0], clock_of(*[(1.0, 0.99, 0.98)] * 6))
    assert found.used == {DENSE}


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "8:16"])
def test_every_way_is_the_dense_product(pattern: str) -> None:
    parts, weight = example(pattern)
    bias = torch.randn(32).bfloat16()
    found = chosen_linear(parts, bias, measured(parts, clock_of(*FEW_DENSE)))
    assert isinstance(found, SparseLinear)
    assert set(found.forms) == {DENSE, CUSPARSELT}
    for shape in ((1, 128), (2, 3, 128), (300, 128), (0, 128)):
        x = torch.randn(shape).bfloat16()
        expected = x.double() @ weight.double().t() + bias.double()
        y = found(x)
        assert (y.shape, y.dtype) == (expected.shape, torch.bfloat16)
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=0.1)
    with pytest.raises(ShapeError, match="linear of 128 inputs"):
        found(torch.ones(1, 64).bfloat16())
    assert (found.weight.shape, found.weight.dtype) == ((32, 128), torch.bfloat16)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("seconds", "forms"),
    [((1.0, 0.5, 0.6), {CUTLASS}), ((1.0, 2.0, 0.6), {CUSPARSELT})],
)
def test_what_is_always_faster_is_held_alone(seconds: Any, forms: set[str]) -> None:
    parts, _ = example("6:8")
    found = chosen_linear(parts, None, measured(parts, clock_of(*[seconds] * 6)))
    assert isinstance(found, SparseLinear)
    assert set(found.forms) == forms


@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_never_faster_becomes_dense() -> None:
    parts, weight = example("6:8")
    found = chosen_linear(
        parts, torch.ones(32).bfloat16(), measured(parts, clock_of(*[(1, 2, 3)] * 6))
    )
    assert type(found) is nn.Linear
    assert torch.equal(found.weight, weight)


def test_what_a_gpu_refuses_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own 2:4 product, which no CPU has."""
    parts, _ = example()
    found = measured(parts, clock_of(*[(1.0,)] * 6))
    assert found.used == {DENSE}

    def lost(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(module.functional, "linear", lost)
    with pytest.raises(torch.OutOfMemoryError):
        measured(parts, clock_of())
