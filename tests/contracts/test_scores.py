"""What every registered score must do."""

from __future__ import annotations

import pytest
import torch

from oracles import scores as oracles
from secateur.sparsity.scores import scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", list(scores))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dead", [0, 3])
def test_equals_its_formula(name, dtype, dead, example):
    case = example((7, 12), dtype=dtype, dead=dead)
    score = scores[name]()(case.weight, case.statistics)
    assert score.dtype == torch.float32
    expected = getattr(oracles, name.replace("-", "_"))(case.weight, case.statistics).float()
    torch.testing.assert_close(score, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", list(scores))
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1), (33, 65)])
def test_odd_shapes_and_signs(name, shape, example):
    case = example(shape)
    score = scores[name]()(case.weight, case.statistics)
    assert score.shape == shape
    negated = scores[name]()(-case.weight, case.statistics)
    if scores[name].whole_units:  # whole columns take the size of a unit's sum
        assert torch.equal(score, -negated)
    else:
        assert bool((score >= 0).all())
        assert torch.equal(score, negated)


@pytest.mark.parametrize("name", list(scores))
def test_leaves_arguments_alone_and_repeats_itself(name, example):
    case = example((6, 8), dead=2)
    weight = case.weight.clone().requires_grad_()
    before = {key: value.clone() for key, value in case.statistics.items()}
    first = scores[name]()(weight, case.statistics)
    first_values = first.clone()
    first += 1  # the score must not share memory with the weight or the statistics
    assert not first.requires_grad
    assert torch.equal(weight, case.weight)
    assert all(torch.equal(before[key], case.statistics[key]) for key in before)
    assert torch.equal(scores[name]()(weight, case.statistics), first_values)


@pytest.mark.parametrize("name", list(scores))
def test_asks_only_for_what_it_names(name, example):
    case = example((6, 8))
    needed = {key: case.statistics[key] for key in scores[name].requires}
    score = scores[name]()
    assert torch.equal(score(case.weight, needed), score(case.weight, case.statistics))


@pytest.mark.parametrize("name", list(scores))
def test_reads_transposed_weights(name, example):
    case = example((6, 8))
    score = scores[name]()
    transposed = case.weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    torch.testing.assert_close(
        score(transposed, case.statistics), score(case.weight, case.statistics)
    )
