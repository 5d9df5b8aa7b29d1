"""Parameters of which the default tests try some, and the slow tests the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
