"""The refinement `swaps` against the best swap of all, found by trying every pair."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import parsed
from oracles.swaps import best_swap, row_error, row_errors, swap_down
from secateur.errors import PatternError, RecipeError, ShapeError
from secateur.sparsity.refinements import refinements
from secateur.sparsity.refinements import swaps as module

SparseSwaps = refinements["swaps"]


def start(case, text, sparsity):
    """A pattern, the M it swaps within, and the mask of the smallest weights."""
    pattern = parsed(text, "row" if text == "unstructured" else None)
    group = pattern.columns_together if pattern.scope == "group" else case.weight.shape[1]
    return pattern, group, pattern.mask(case.weight.abs(), sparsity)


PATTERNS = [("unstructured", 0.4), ("unstructured", 0.9), ("2:4", 0.5), ("1:4", 0.75), ("3:5", 0.4)]


@pytest.mark.parametrize(("text", "sparsity"), PATTERNS)
@pytest.mark.parametrize("swaps", [1, 2, 5])
def test_one_swap_at_a_time_is_the_best_of_all_pairs(text, sparsity, swaps, example):
    case = example((7, 20), seed=1)
    pattern, group, mask = start(case, text, sparsity)
    expected = swap_down(case.weight, mask, case.statistics["gram"], group, swaps)
    one, refined = SparseSwaps(swaps=1, candidates=20), mask
    for _ in range(swaps):
        refined = one.refine(case.weight, refined, case.statistics, pattern, sparsity)
    assert torch.equal(refined, expected)


@pytest.mark.parametrize(("text", "sparsity"), PATTERNS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_at_a_time_end_where_no_swap_is_left(text, sparsity, seed, example):
    case = example((7, 20), seed=seed, dead=seed)
    gram = case.statistics["gram"]
    pattern, group, mask = start(case, text, sparsity)
    refined = SparseSwaps(candidates=20).refine(
        case.weight, mask, case.statistics, pattern, sparsity
    )
    g = gram.double().tolist()
    for row, kept in zip(case.weight.double().tolist(), refined.tolist(), strict=True):
        least, _, _ = best_swap(row, kept, g, group)
        error = row_error(row, kept, g)
        assert least >= error - 1e-4 * max(error, 1.0)
    # Another order of swaps ends elsewhere, but not much worse.
    greedy = swap_down(case.weight, mask, gram, group, 100)
    ours, theirs = (sum(row_errors(case.weight, m, gram)) for m in (refined, greedy))
    assert ours <= 1.15 * theirs


@pytest.mark.parametrize("candidates", [1, 2, 7])
@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_few_candidates_lower_the_error_too(candidates, text, example):
    case = example((9, 36), seed=3)
    pattern, _, mask = start(case, text, 0.5)
    refined = SparseSwaps(candidates=candidates).refine(
        case.weight, mask, case.statistics, pattern, 0.5
    )
    before, after = (row_errors(case.weight, m, case.statistics["gram"]) for m in (mask, refined))
    assert all(new <= old for new, old in zip(after, before, strict=True))
    assert sum(after) < 0.9 * sum(before)


def test_never_more_swaps_than_asked_for(example):
    case = example((6, 48), seed=2)
    pattern = parsed("unstructured", "row")
    mask = pattern.mask(-case.weight.abs(), 0.5)  # the largest weights are pruned: much to swap
    for swaps in (1, 3, 8):
        refined = SparseSwaps(swaps=swaps).refine(case.weight, mask, case.statistics, pattern, 0.5)
        made = (mask & ~refined).sum(1)
        assert int(made.max()) == swaps


def test_rows_do_not_depend_on_each_other(example, monkeypatch):
    case = example((11, 24), seed=4)
    pattern, _, mask = start(case, "unstructured", 0.5)
    whole = SparseSwaps().refine(case.weight, mask, case.statistics, pattern, 0.5)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 2)
    chunked = SparseSwaps().refine(case.weight, mask, case.statistics, pattern, 0.5)
    assert torch.equal(whole, chunked)


def test_dead_weights_are_pruned_for_living_ones(example):
    case = example((5, 16), dead=4)
    dead = case.statistics["gram"].diagonal() == 0
    pattern = parsed("unstructured", "row")
    mask = pattern.mask(dead.float().expand(5, 16).contiguous(), 0.75)  # only dead ones are kept
    refined = SparseSwaps(candidates=16).refine(case.weight, mask, case.statistics, pattern, 0.75)
    assert not refined[:, dead].any()


def test_uncorrelated_inputs_leave_wanda_as_it_is(example):
    # Without correlation the error is a sum over weights, and Wanda's choice per row the best.
    weight = example((8, 30)).weight
    gram = torch.diag(torch.linspace(1, 5, 30))
    pattern = parsed("unstructured", "row")
    mask = pattern.mask(weight.abs() * gram.diagonal().sqrt(), 0.5)
    assert torch.equal(SparseSwaps().refine(weight, mask, {"gram": gram}, pattern, 0.5), mask)


def test_a_row_that_rounding_made_worse_gets_its_mask_back(example, monkeypatch):
    case = example((6, 24))
    pattern, _, mask = start(case, "unstructured", 0.5)
    monkeypatch.setattr(module, "_swapped", lambda weight, kept, *_: kept.roll(1, 1))
    refined = SparseSwaps().refine(case.weight, mask, case.statistics, pattern, 0.5)
    before, after = (row_errors(case.weight, m, case.statistics["gram"]) for m in (mask, refined))
    assert all(new <= old for new, old in zip(after, before, strict=True))
    assert any(torch.equal(a, b) for a, b in zip(refined, mask, strict=True))


@pytest.mark.parametrize("text", ["16x1", "4x2", "1x8"])
def test_blocks_are_refused(text, example):
    case, pattern = example((16, 16)), parsed(text, None)
    mask = pattern.mask(case.weight.abs(), 0.5)
    with pytest.raises(PatternError, match=f"single weights of {text} cannot be swapped"):
        SparseSwaps().refine(case.weight, mask, case.statistics, pattern, 0.5)


def test_groups_that_do_not_fit_are_refused(example):
    case = example((4, 10))
    with pytest.raises(ShapeError, match="divisible by 4"):
        SparseSwaps().refine(
            case.weight, case.weight > 0, case.statistics, parsed("2:4", None), 0.5
        )


@pytest.mark.parametrize("arguments", [{"swaps": 0}, {"candidates": 0}])
def test_impossible_parameters_are_refused(arguments):
    with pytest.raises(RecipeError, match="is 0"):
        SparseSwaps(**arguments)
