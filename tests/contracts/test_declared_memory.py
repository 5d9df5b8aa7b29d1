"""What scores, patterns, refinements and solvers declare, they do not exceed (`working_bytes`)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from contracts.pattern_examples import ALL, parsed
from secateur.engine.stream.halted_forwards import LiveTensors
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores

SHAPE = (768, 480)
SMALL = 2**17
"""Bytes for what does not grow with the matrix."""


@functools.cache
def wide(example, dtype):
    """A matrix of that shape, not to be changed."""
    return example(SHAPE, dtype=dtype)


def peak_bytes(work: Callable[[], object], *there: Tensor) -> int:
    """The most that is alive while something is done, besides what is there before."""
    live = LiveTensors(there, find_peak=True)
    with live:
        work()
    return live.peak_bytes


@pytest.mark.parametrize("name", list(scores))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(name: str, dtype: torch.dtype, example) -> None:
    case, score = wide(example, dtype), scores[name]()
    there = case.weight, *case.statistics.values()
    found = peak_bytes(lambda: score(case.weight, case.statistics), *there)
    assert found <= score.working_bytes(SHAPE) + SMALL


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_patterns(text: str, scope: str | None) -> None:
    pattern, score = parsed(text, scope), torch.rand(SHAPE)
    sparsity = 0.5 if pattern.sparsity is None else pattern.sparsity
    found = peak_bytes(lambda: pattern.mask(score, sparsity), score)
    assert found <= pattern.working_bytes(SHAPE) + SMALL


FEW_STEPS = {"swaps": {"swaps": 3}}
"""Options of refinements whose later steps take no more memory than the first ones."""


@pytest.mark.parametrize("name", list(refinements))
@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_refinements(name: str, text: str, example) -> None:
    case, pattern = wide(example, torch.float32), parsed(text, None)
    mask = pattern.mask(case.weight.abs(), 0.5)
    refinement = refinements[name](**FEW_STEPS.get(name, {}))
    there = case.weight, mask, *case.statistics.values()
    found = peak_bytes(
        lambda: refinement.refine(case.weight, mask, case.statistics, pattern, 0.5), *there
    )
    assert found <= refinement.working_bytes(SHAPE) + SMALL
