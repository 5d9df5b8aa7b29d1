"""The global threshold, against one sort of everything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericalError, PatternError, RecipeError
from secateur.sparsity.allocation.global_threshold import global_threshold


def brute_force(tensors: dict[str, torch.Tensor], pruned: int) -> dict[str, int]:
    """Sort (score, order of name, index) and count the first ones by name."""
    entries = [
        (value, order, index)
        for order, tensor in enumerate(tensors.values())
        for index, value in enumerate(tensor.flatten().tolist())
    ]
    gone = [order for _, order, _ in sorted(entries)[:pruned]]
    return {name: gone.count(order) for order, name in enumerate(tensors)}


scores = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 1e-45, 3e38, math.inf]),
    st.floats(0, 1e6, width=32),
)


@settings(max_examples=60, deadline=None)
@given(lists=st.lists(st.lists(scores, max_size=12), min_size=1, max_size=5), data=st.data())
def test_equals_one_sort(lists, data):
    tensors = {f"layer {i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(lists)}
    pruned = data.draw(st.integers(0, sum(map(len, lists))))
    assert global_threshold(lambda: iter(tensors.items()), pruned) == brute_force(tensors, pruned)


@pytest.mark.parametrize("levels", [3, 10**6])
def test_matrices_and_blocks(levels):
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(levels, shape, generator=random).float() / 7
        for name, shape in {"b": (30, 17), "a": (4, 4), "c": (1, 100)}.items()
    }
    for pruned in (0, 1, 313, 625, 626):
        counts = global_threshold(lambda: iter(tensors.items()), pruned)
        assert list(counts) == ["b", "a", "c"]
        assert counts == brute_force(tensors, pruned)


def test_only_one_tensor_is_alive_at_a_time():
    alive = []

    def stream():
        for i in range(4):
            score = torch.full((10,), float(i))
            alive.append(i)
            yield str(i), score

    assert global_threshold(stream, 25) == {"0": 10, "1": 10, "2": 5, "3": 0}
    assert alive == [0, 1, 2, 3] * 2  # two passes, each in order


@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf])
def test_scores_without_a_place_are_refused(bad):
    with pytest.raises(NumericalError, match="where: second"):
        global_threshold(
            lambda: iter([("first", torch.ones(3)), ("second", torch.tensor([1.0, bad]))]), 2
        )


@pytest.mark.parametrize("pruned", [-1, 7])
def test_more_than_there_is_is_refused(pruned):
    with pytest.raises(PatternError, match=f"cannot prune {pruned} of 6"):
        global_threshold(lambda: iter([("a", torch.ones(6))]), pruned)


def test_a_name_is_used_once():
    with pytest.raises(RecipeError, match="'a'"):
        global_threshold(lambda: iter([("a", torch.ones(2)), ("a", torch.ones(2))]), 1)


def test_changing_scores_are_noticed():
    passes = iter([torch.ones(4), torch.arange(4.0)])
    with pytest.raises(NumericalError, match="changed between"):
        global_threshold(lambda: iter([("a", next(passes))]), 2)
