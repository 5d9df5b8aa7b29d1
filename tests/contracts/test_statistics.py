"""What every registered statistic must do."""

from __future__ import annotations

import pytest
import torch

from oracles import scores as oracles
from secateur.calibration.statistics import Gathering, statistics
from secateur.errors import NumericalError, RecipeError

OF_INPUTS = sorted(Gathering.of(statistics).forward)
OF_GRADIENTS = sorted(Gathering.of(statistics).backward)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gathered(name, batches, in_features):
    statistic = statistics[name]((5, in_features))
    for batch in batches:
        statistic.update(batch)
    return statistic


@pytest.fixture
def x():
    return torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("name", OF_INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_formula(name, dtype, x):
    x = x.to(dtype)
    value = gathered(name, x.split(7), 9).value()
    assert value.dtype == torch.float32
    expected = getattr(oracles, name)(x).float()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OF_INPUTS)
def test_merging_equals_seeing_everything(name, x):
    whole = gathered(name, [x], 9).value()
    first, second = gathered(name, [x[:20]], 9), gathered(name, x[20:].split(11), 9)
    before = second.total.clone()
    first.merge(second)
    first.merge(gathered(name, [], 9))
    torch.testing.assert_close(first.value(), whole)
    assert torch.equal(second.total, before)


@pytest.mark.parametrize("name", OF_INPUTS)
def test_order_does_not_matter(name, x):
    batches = list(x.split(6))
    forwards, backwards = gathered(name, batches, 9), gathered(name, batches[::-1], 9)
    torch.testing.assert_close(forwards.value(), backwards.value())


@pytest.mark.parametrize("name", OF_INPUTS)
def test_a_value_can_be_read_again(name, x):
    statistic = gathered(name, [x], 9)
    assert torch.equal(statistic.value().clone(), statistic.value())


@pytest.mark.parametrize("name", ["gram", "column_norm"])
def test_the_value_is_the_same_however_the_updates_are_divided(name):
    draw = torch.Generator().manual_seed(3)
    batches = (torch.randn(600, 300, generator=draw) * torch.logspace(-3, 3, 300)).split(20)
    whole = gathered(name, batches, 300).value()
    for cut in (1, 7, 29):
        first, second = gathered(name, batches[:cut], 300), gathered(name, batches[cut:], 300)
        second.merge(first)
        assert torch.equal(second.value(), whole)


@pytest.mark.parametrize("name", OF_INPUTS)
def test_leaves_inputs_alone_and_repeats_itself(name, x):
    before = x.clone()
    one, two = (gathered(name, [x.requires_grad_()], 9).value() for _ in range(2))
    assert torch.equal(x, before)
    assert torch.equal(one, two)
    assert not one.requires_grad


@pytest.mark.parametrize("name", OF_INPUTS)
def test_no_tokens_and_strided_tokens(name, x):
    assert not gathered(name, [x[:0]], 9).value().any()
    strided = x.t().contiguous().t()
    torch.testing.assert_close(
        gathered(name, [strided[::2]], 9).value(), gathered(name, [x[::2]], 9).value()
    )


@pytest.mark.parametrize("name", OF_INPUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_refused(name, bad, x):
    x = x.to(torch.float16)
    x[3, 5] = bad
    with pytest.raises(NumericalError, match="feature 5"):
        gathered(name, [x], 9).value()


@pytest.mark.parametrize("in_features", [1, 700, 1024, 1300])
def test_gram_by_blocks_is_symmetric_and_right(in_features):
    x = torch.randn(6, in_features, generator=torch.Generator().manual_seed(0))
    value = gathered("gram", x.split(4), in_features).value()
    assert torch.equal(value, value.t())
    torch.testing.assert_close(value, oracles.gram(x).float(), rtol=1e-4, atol=1e-4)


def test_column_norm_is_the_root_of_the_gram_diagonal(x):
    norm, gram = gathered("column_norm", [x], 9).value(), gathered("gram", [x], 9).value()
    torch.testing.assert_close(norm, gram.diagonal().sqrt())


def test_column_norm_of_more_tokens_than_one_chunk():
    x = torch.randn(3000, 301, generator=torch.Generator().manual_seed(0))
    value = gathered("column_norm", [x], 301).value()
    torch.testing.assert_close(value, x.double().square().sum(0).sqrt().float())


def gradients(dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(5, 9, generator=random).to(dtype) for _ in range(6)]


@pytest.mark.parametrize("name", OF_GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_gradients_equals_its_formula(name, dtype):
    windows = gradients(dtype)
    value = gathered(name, windows, 9).value()
    assert value.dtype == torch.float32
    power = {"gradient": 1, "fisher": 2}[name]
    expected = torch.stack([w.double() ** power for w in windows]).mean(0)
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_merging_gradients_equals_seeing_every_window(name):
    windows = gradients()
    first, second = gathered(name, windows[:2], 9), gathered(name, windows[2:], 9)
    first.merge(second)
    torch.testing.assert_close(first.value(), gathered(name, windows, 9).value())
    assert not gathered(name, [], 9).value().any()


@pytest.mark.parametrize("name", list(statistics))
def test_holds_no_more_than_it_says(name):
    shape = (40, 24)
    statistic = statistics[name](shape)
    statistic.update(torch.ones(shape))
    nbytes = statistics[name].nbytes(shape)
    # a count of a few bytes may come on top
    assert nbytes <= statistic.total.nbytes <= nbytes + 8
    assert statistics[name].source.name in ("inputs", "gradients")


def test_an_unknown_statistic_is_refused_with_near_names():
    with pytest.raises(RecipeError, match="unknown statistic 'column_nrom'"):
        Gathering.of({"column_nrom"})
