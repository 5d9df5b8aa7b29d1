"""What every registered pattern must do, with every registered score."""

from __future__ import annotations

import pytest
import torch
from slow import every_pair

from contracts.pattern_examples import ALL, EXAMPLES, fitting_shape, parsed, sparsities
from oracles import patterns as oracles
from secateur.errors import NumericalError, PatternError, ShapeError
from secateur.sparsity.patterns import patterns
from secateur.sparsity.scores import scores


def test_every_kind_has_examples():
    assert set(EXAMPLES) == set(patterns)


def check_mask(pattern, text, scope, score, sparsity):
    """The mask is the oracle's, and its count the one promised."""
    before = score.clone()
    mask = pattern.mask(score, sparsity)
    assert mask.shape == score.shape
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == pattern.pruned(tuple(score.shape), sparsity)
    assert torch.equal(mask, oracles.mask_of(text, scope, score, sparsity))
    assert torch.equal(score, before)
    assert torch.equal(mask, pattern.mask(score, sparsity))


@pytest.mark.parametrize(
    ("text", "scope", "name", "dtype"),
    every_pair(ALL, scores, [torch.float32, torch.bfloat16, torch.float16]),
)
def test_masks_of_every_score(text, scope, name, dtype, example):
    pattern = parsed(text, scope)
    case = example(fitting_shape(text), dtype=dtype, dead=2)
    score = scores[name]()(case.weight, case.statistics)
    for sparsity in sparsities(pattern):
        check_mask(pattern, text, scope, score, sparsity)


@pytest.mark.parametrize(("text", "scope"), ALL)
@pytest.mark.parametrize("name", list(scores))
def test_ties(text, scope, name, example):
    pattern = parsed(text, scope)
    case = example(fitting_shape(text), tied=True)
    score = scores[name]()(case.weight, case.statistics)
    for sparsity in sparsities(pattern):
        check_mask(pattern, text, scope, score, sparsity)


@pytest.mark.parametrize(("text", "scope"), ALL)
@pytest.mark.parametrize("fill", [0.0, float("inf")])
def test_scores_all_alike(text, scope, fill):
    pattern = parsed(text, scope)
    for sparsity in sparsities(pattern):
        check_mask(pattern, text, scope, torch.full(fitting_shape(text), fill), sparsity)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_negative_and_infinite_scores_and_strides(text, scope):
    pattern = parsed(text, scope)
    rows, columns = fitting_shape(text)
    score = torch.randint(-3, 4, (columns, rows), generator=torch.Generator().manual_seed(1))
    score = score.float().t()  # not contiguous
    for sparsity in sparsities(pattern):
        check_mask(pattern, text, scope, score, sparsity)
    infinite = score.masked_fill(score > 2, float("inf"))
    for sparsity in sparsities(pattern):
        check_mask(pattern, text, scope, infinite, sparsity)


@pytest.mark.parametrize(("text", "scope"), ALL)
@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 50.0, float("nan"), float("inf")])
def test_impossible_sparsities_are_refused(text, scope, sparsity):
    with pytest.raises(PatternError, match="sparsity is"):
        parsed(text, scope).mask(torch.rand(fitting_shape(text)), sparsity)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_all_of_a_matrix_only_by_a_global_threshold(text, scope):
    pattern, score = parsed(text, scope), torch.rand(fitting_shape(text))
    if scope == "global" or text.startswith("*x"):  # a block of the model that adds nothing
        assert not pattern.mask(score, 1.0).any()
    else:
        with pytest.raises(PatternError, match=r"sparsity is 1\.0"):
            pattern.mask(score, 1.0)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_nan_is_refused(text, scope):
    pattern = parsed(text, scope)
    score = torch.rand(fitting_shape(text))
    score[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="not a number"):
        pattern.mask(score, sparsities(pattern)[-1])


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_shapes_that_do_not_divide_are_refused(text, scope):
    pattern = parsed(text, scope)
    rows, columns = fitting_shape(text)
    if pattern.columns_together > 1:
        with pytest.raises(ShapeError, match=str(columns + 1)):
            pattern.check((rows, columns + 1), sparsities(pattern)[-1])
    if "x" in text and not text.startswith(("1x", "*x")):
        with pytest.raises(ShapeError, match=str(rows + 1)):
            pattern.mask(torch.rand(rows + 1, columns), 0.5)


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_is_written_as_it_is_read(text, scope):
    pattern = parsed(text, scope)
    assert pattern.name == text
    assert scope is None or pattern.scope == scope
    assert parsed(pattern.name, scope) == pattern


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_units_are_what_competes(text, scope):
    pattern = parsed(text, scope)
    score = torch.rand(fitting_shape(text))
    if pattern.scope == "group":
        with pytest.raises(PatternError, match="each group"):
            pattern.units(score)
        return
    units = pattern.units(score)
    # The share of units a global threshold finds is the sparsity that prunes just as many.
    for count in range(units.numel() + 1 if scope == "global" else units.numel()):
        shape = (len(score), score.shape[1])
        if count * score.numel() // units.numel() % pattern.step(shape) and text.startswith("*x"):
            continue  # pruned in multiples of several units
        pruned = pattern.pruned(shape, count / units.numel())
        if pattern.scope != "row":
            assert pruned * units.numel() == count * score.numel()
