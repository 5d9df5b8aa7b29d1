"""What every registered refinement must do, with every pattern."""

from __future__ import annotations

import pytest
import torch
from slow import every_pair

from contracts.pattern_examples import ALL, fitting_shape, parsed, sparsities
from oracles.swaps import row_errors
from secateur.errors import NumericalError, PatternError
from secateur.sparsity.refinements import Refinement, refinements

EVERY = [(name, text, scope) for name in refinements for text, scope in ALL]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def refined_or_refused(refinement, case, mask, pattern, sparsity):
    """The refined mask, or None for a pattern it refuses."""
    try:
        return refinement.refine(case.weight, mask, case.statistics, pattern, sparsity)
    except PatternError as refusal:
        assert pattern.name in str(refusal)  # noqa: PT017
        return None


@pytest.mark.parametrize(
    ("name", "text", "scope", "dtype", "kind"),
    every_pair(EVERY, DTYPES, ["plain", "tied", "dead"]),
)
def test_keeps_counts_and_never_raises_the_error(name, text, scope, dtype, kind, example):
    refinement, pattern = refinements[name](), parsed(text, scope)
    case = example(
        fitting_shape(text), dtype=dtype, tied=kind == "tied", dead=5 if kind == "dead" else 0
    )
    gram = case.statistics["gram"]
    for sparsity in sparsities(pattern):
        mask = pattern.mask(case.weight.float().abs(), sparsity)
        refined = refined_or_refused(refinement, case, mask, pattern, sparsity)
        if refined is None:
            continue
        assert refined.dtype == torch.bool
        assert refined.shape == mask.shape
        assert torch.equal(refined.sum(1), mask.sum(1))
        if pattern.scope != "row":  # the mask is one the pattern allows
            assert torch.equal(pattern.mask(refined.float(), sparsity), refined)
        before, after = (row_errors(case.weight, m, gram) for m in (mask, refined))
        assert all(new <= old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize(("name", "text", "scope"), EVERY)
def test_leaves_arguments_alone_and_repeats_itself(name, text, scope, example):
    refinement, pattern = refinements[name](), parsed(text, scope)
    assert isinstance(refinement, Refinement)
    case = example(fitting_shape(text), dead=1)
    sparsity = sparsities(pattern)[-1]
    mask = pattern.mask(case.weight.abs(), sparsity)
    arguments = [case.weight, mask, *case.statistics.values()]
    before = [x.clone() for x in arguments]
    first = refined_or_refused(refinement, case, mask, pattern, sparsity)
    if first is None:
        return
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    kept = first.clone()
    first.logical_not_()  # must share no memory with the arguments
    statistics = {n: v for n, v in case.statistics.items() if n in refinement.requires}
    weight = case.weight.clone().requires_grad_()
    assert torch.equal(refinement.refine(weight, mask, statistics, pattern, sparsity), kept)


@pytest.mark.parametrize("name", list(refinements))
@pytest.mark.parametrize("kept", [True, False])
def test_nothing_to_choose(name, kept, example):
    case = example((5, 12))
    mask = torch.full((5, 12), kept)
    pattern = parsed("unstructured", "global")
    refined = refinements[name]().refine(
        case.weight, mask, case.statistics, pattern, 0.0 if kept else 1.0
    )
    assert torch.equal(refined, mask)


@pytest.mark.parametrize("name", list(refinements))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name, bad, example):
    case, pattern = example((3, 8)), parsed("2:4", None)
    mask = pattern.mask(case.weight, 0.5)
    broken = case.weight.clone()
    broken[1, 2] = bad
    with pytest.raises(NumericalError, match="infinite values or NaN"):
        refinements[name]().refine(broken, mask, case.statistics, pattern, 0.5)
    gram = case.statistics["gram"].clone()
    gram[4, 4] = bad
    with pytest.raises(NumericalError, match="1 of 8 calibration inputs"):
        refinements[name]().refine(case.weight, mask, {"gram": gram}, pattern, 0.5)
