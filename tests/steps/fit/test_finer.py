"""Sparsities between levels: bytes are those of the formats, rises lie between measured ones."""

from __future__ import annotations

import pytest
import torch

from secateur.runtime.storage_plan import choose_layout
from secateur.steps.fitting.candidates import finer_bytes, finer_rise
from secateur.steps.fitting.storage_formats import FINER, LEVELS, StorageFormat, size_of

SHAPE = (64, 128)
RISES = tuple(
    {0.0: 0.0, 0.5: 0.02, 0.7: 0.08}[stored.sparsity]
    + {"bfloat16": 0.0, "int8": 0.001, "int4": 0.004, "int3": 0.016}[stored.values]
    for stored in LEVELS
)
"""Pruning and rounding that simply add up."""


def rise(values: str, sparsity: float) -> float:
    return finer_rise(StorageFormat(values, sparsity), RISES)


@pytest.mark.parametrize("values", ["int4", "int3"])
def test_rises_meet_those_of_the_levels_and_grow_with_the_zeros(values: str) -> None:
    known = RISES[LEVELS.index(StorageFormat(values, 0.5))]
    assert rise(values, 0.5) == pytest.approx(known)
    assert rise("int4", 0.7) == pytest.approx(RISES[LEVELS.index(StorageFormat("int4", 0.7))])
    grown = [rise(values, s) for s in (0.3, 0.4, 0.5, 0.6, 0.7)]
    assert grown == sorted(grown)
    assert rise(values, 0.6) < (rise(values, 0.5) + rise(values, 0.7)) / 2  # zeros cost ever more


@pytest.mark.parametrize("stored", FINER, ids=lambda stored: stored.name)
def test_bytes_are_those_of_a_packed_matrix(stored: StorageFormat) -> None:
    """All kept weights have the largest integer, so rounding adds no zeros."""
    scale, most = torch.ones(SHAPE), {"int4": 7.0, "int3": 3.0}[stored.values]
    weight = (scale * most).flatten()
    weight[torch.randperm(weight.numel())[: round(stored.sparsity * weight.numel())]] = 0
    packed = choose_layout(weight.reshape(SHAPE), format="auto", values=stored.values)
    costs = tuple(float(size_of(SHAPE, level)) for level in LEVELS)
    assert abs(packed.nbytes - finer_bytes(stored, SHAPE, costs)) <= 1
