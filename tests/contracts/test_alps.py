"""ALPS: the paper's iteration, its place among the solvers, and what it refuses."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from oracles.alps import alps as slow_alps
from oracles.sparsegpt import relative_error
from secateur.errors import RecipeError
from secateur.sparsity import shifted_inverse
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers


def correlated(seed: int, rows: int = 24, inputs: int = 48, tokens: int = 400):
    """A weight and inputs whose columns explain each other, as those of language models do."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 4, inputs, generator=draw)
    x = torch.randn(tokens, inputs // 4, generator=draw) @ mixing
    x += 0.5 * torch.randn(tokens, inputs, generator=draw)
    x *= torch.rand(inputs, generator=draw) + 0.1
    return torch.randn(rows, inputs, generator=draw), x


def statistics_of(x):
    return {"gram": x.t() @ x, "column_norm": x.norm(dim=0)}


@functools.cache
def slow(seed: int, sparsity: float):
    """A weight, its inputs, and what the slow iteration makes of them."""
    weight, x = correlated(seed)
    return weight, x, *slow_alps(weight, x.t() @ x, round((1 - sparsity) * weight.numel()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_equals_the_slow_iteration(
    seed: int, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifted_inverse, "_PRECISION", 1e-6)
    weight, x, expected, mask = slow(seed, sparsity)
    # enough refit steps to reach the exact solution
    solver = solvers["alps"](tolerance=0.0, refit_steps=200)
    pattern = parse_pattern("unstructured", "layer")
    prepared = solver.prepare(statistics_of(x))
    found = solver.choose(weight, prepared, pattern, sparsity)
    assert int((found.mask != mask).sum()) <= 4  # of 1152: near ties fall either way in float32
    if torch.equal(found.mask, mask):
        assert torch.allclose(found.weight.double(), expected, rtol=1e-3, atol=1e-3)
    ours, theirs = (relative_error(weight, w, x) for w in (found.weight, expected))
    assert ours == pytest.approx(theirs, rel=5e-3)


def test_as_good_as_the_slow_iteration() -> None:
    """With inverses that are only right to within half a percent, masks differ, errors do not."""
    ratios = []
    for seed, sparsity in itertools.product(range(8), (0.25, 0.5, 0.75)):
        weight, x, expected, _ = slow(seed, sparsity)
        solver = solvers["alps"](tolerance=0.0, refit_steps=200)
        prepared = solver.prepare(statistics_of(x))
        found = solver.choose(weight, prepared, parse_pattern("unstructured", "layer"), sparsity)
        ours, theirs = (relative_error(weight, w, x) for w in (found.weight, expected))
        ratios.append(ours / theirs)
    assert max(ratios) < 1.04
    assert sum(ratios) / len(ratios) < 1.003


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_alps_beats_sparsegpt_beats_wanda(text: str, seed: int) -> None:
    weight, x = correlated(seed)
    statistics = statistics_of(x)
    pattern = parse_pattern(text)
    sparsity = pattern.sparsity or 0.6
    mask = pattern.mask(scores["wanda"]()(weight, statistics), sparsity)
    errors = {"wanda": relative_error(weight, weight * mask, x)}
    for name in ("obs", "alps"):
        solver = solvers[name]()
        solution = solver.choose(weight, solver.prepare(statistics), pattern, sparsity)
        assert int((~solution.mask).sum()) == pattern.pruned(weight.shape, sparsity)
        errors[name] = relative_error(weight, solution.weight, x)
    assert errors["alps"] < errors["obs"] < errors["wanda"]
    better = refinements["swaps"]().refine(weight, mask, statistics, pattern, sparsity)
    assert relative_error(weight, weight * better, x) <= errors["wanda"]


def test_refit_of_a_given_mask_reaches_least_squares() -> None:
    weight, x = correlated(7)
    statistics, pattern = statistics_of(x), parse_pattern("2:4")
    mask = pattern.mask(weight.abs(), 0.5)
    found = []
    for name, options in (("alps", {"refit_steps": 100}), ("least-squares", {})):
        solver = solvers[name](**options)
        prepared = solver.prepare(statistics)
        found.append(solver.solve(weight, prepared, mask).weight)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"iterations": 0}, {"rho": 0.0}, {"growth": 0.5}, {"tolerance": -1.0}, {"damping": -0.1}],
)
def test_refuses_parameters_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        solvers["alps"](**options)
