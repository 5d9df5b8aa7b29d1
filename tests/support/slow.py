"""Parameters of which the default tests try some, and the slow tests the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def slow_but(few: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """All of `every`; those that are not among `few` are marked as slow.

    A value with several parameters is a tuple, as `pytest.mark.parametrize` takes them.
    """
    values = list(every)
    unknown = [value for value in few if value not in values]
    assert not unknown, f"not among the parameters: {unknown}"
    return [value if value in few else slow(value) for value in values]


def every_pair(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of the values of several parameters, most of them marked as slow.

    The default tests try so many that any two values of different parameters meet in one of them.
    A value with several parameters is a tuple, as in `slow_but`.
    """
    ordered = [list(axis) for axis in axes]
    met: set[Any] = set()
    values = []
    # Neighbours differ in all places, so that each one brings many new pairs.
    for place in sorted(product(*map(range, map(len, ordered))), key=lambda x: spread(x, ordered)):
        pairs = {*combinations(enumerate(place), 2)}
        parts = [axis[i] for axis, i in zip(ordered, place, strict=True)]
        flat = tuple(x for part in parts for x in (part if isinstance(part, tuple) else (part,)))
        values.append(slow(flat) if pairs <= met else flat)
        met |= pairs
    return values


def spread(place: tuple[int, ...], axes: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    """A key that puts combinations next to each other that differ in all places."""
    first, *others = place
    return (*((i - first) % len(axis) for i, axis in zip(others, axes[1:], strict=True)), first)


def slow(value: Any) -> Any:
    """A value whose tests are slow."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)


FEW_FAMILIES = frozenset({"llama", "gpt2", "gemma3", "generic", "mixtral"})
"""Families of `zoo` that differ most: plain, transposed and fused, several kinds of attention,
undeclared, with experts."""


def few_families(families: Iterable[str]) -> list[Any]:
    """All of `families`; those that are not in `FEW_FAMILIES` are marked as slow."""
    every = list(families)
    return slow_but([family for family in every if family in FEW_FAMILIES], every)
