"""Small linears with all their statistics, for tests that every registered part must pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A linear and what is known of it."""

    weight: Tensor
    inputs: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)


def make_example(
    shape: tuple[int, int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    dead: int = 0,
) -> Example:
    """A weight [out, in] with correlated inputs.

    Args:
        shape: (out, in).
        seed: of the random numbers.
        dtype: of the weight.
        tied: every weight has the same magnitude and no input stands out.
        dead: this many columns, spread out, whose inputs are always zero.
    """
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape
    tokens = 3 * columns + 5
    weight = torch.randn(rows, columns, generator=random)
    gradients = torch.randn(4, rows, columns, generator=random) * 1e-2
    if tied:
        weight = weight.sign() * 0.5
        inputs = torch.eye(columns)
        gradients = torch.full_like(gradients, 0.25)
    else:
        latent = columns // 2 + 1
        shared = torch.randn(tokens, latent, generator=random)
        inputs = shared @ torch.randn(latent, columns, generator=random) / latent**0.5
        inputs += 0.3 * torch.randn(tokens, columns, generator=random)
    gone = torch.arange(dead) * (columns // max(dead, 1))
    inputs[:, gone] = 0.0
    gradients[:, :, gone] = 0.0
    statistics = {
        "column_norm": torch.linalg.vector_norm(inputs, dim=0),
        "gram": inputs.t() @ inputs,
        "column_mean": inputs.mean(0),
        "column_variance": inputs.var(0, unbiased=False),
        "gradient": gradients.mean(0),
        "fisher": gradients.square().mean(0),
        # what is solved may have been fitted to something; the zeros are those of the file
        "stored": weight.masked_fill(torch.rand(shape, generator=random) < 0.5, 0.0).to(dtype),
    }
    return Example(weight.to(dtype), inputs, statistics)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Matrices this small are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def example():
    return make_example
