"""A batch of matrices gets what each of them gets alone, from every part that takes batches."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import ALL, fitting_shape, parsed, sparsities
from secateur.sparsity.hessian import dense_target, inverse_factor, relative_output_error
from secateur.sparsity.methods import compose, methods
from secateur.sparsity.scores import scores
from secateur.sparsity.shifted_inverse import inverse
from secateur.sparsity.solvers import solvers

SOLVERS = [name for name in solvers if solvers[name].batched]
ROUNDING = [("obs", 8), ("obs", 3), ("alps", 8), ("alps", 4), ("zero", 8), ("zero", 4)]


def cases(example, shape, dtype=torch.float32):
    """Matrices that have little in common: they end after different numbers of iterations."""
    return [
        example(shape, seed=1, dtype=dtype),
        example(shape, seed=2, dtype=dtype, dead=3),
        example(shape, dtype=dtype, tied=True),
        example(shape, seed=3, dtype=dtype),
    ]


def stacked(cases):
    """The weights and the statistics of a batch."""
    names = cases[0].statistics
    statistics = {name: torch.stack([case.statistics[name] for case in cases]) for name in names}
    return torch.stack([case.weight for case in cases]), statistics


def check_equal(found, alone):
    """What a batch found is what was found of each alone, up to the order of sums in products."""
    assert found.mask.shape == found.weight.shape
    assert found.weight.is_contiguous()
    for number, single in enumerate(alone):
        assert torch.equal(found.mask[number], single.mask)
        off = (found.weight[number] - single.weight).norm() / single.weight.norm().clamp_min(1e-9)
        assert float(off) < 5e-6
        if single.error is not None:
            error = float(single.error)
            assert float(found.error[number]) == pytest.approx(error, rel=1e-4, abs=1e-8)
        if single.shift is not None:
            assert torch.allclose(found.shift[number], single.shift, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(scores))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(name, dtype, example):
    every = cases(example, (7, 36), dtype)
    weight, statistics = stacked(every)
    assert scores[name].batched
    found = scores[name]()(weight, statistics)
    for number, case in enumerate(every):
        assert torch.allclose(found[number], scores[name]()(case.weight, case.statistics))


@pytest.mark.parametrize(("text", "scope"), ALL)
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_patterns(text, scope, levels):
    pattern, (rows, inputs) = parsed(text, scope), fitting_shape(text)
    random = torch.Generator().manual_seed(levels)
    score = torch.randint(levels, (5, rows, inputs), generator=random).float()
    allowed = torch.rand(score.shape, generator=random) < 0.9
    for sparsity in sparsities(pattern):
        found, held = pattern.mask(score, sparsity), pattern.mask(score, sparsity, allowed=allowed)
        for number, own in enumerate(score):
            assert torch.equal(found[number], pattern.mask(own, sparsity))
            assert torch.equal(held[number], pattern.mask(own, sparsity, allowed=allowed[number]))


def check_solver(solver, pattern, every, levels):
    """Both ways in which a solver prunes a batch."""
    weight, statistics = stacked(every)
    prepared, alone = solver.prepare(statistics), [solver.prepare(x.statistics) for x in every]
    for sparsity in levels:
        masks = pattern.mask(weight.abs(), sparsity)
        check_equal(
            solver.solve(weight, prepared, masks),
            [solver.solve(*each) for each in zip(weight, alone, masks, strict=True)],
        )
        if solver.selects_by:
            check_equal(
                solver.choose(weight, prepared, pattern, sparsity),
                [solver.choose(*x, pattern, sparsity) for x in zip(weight, alone, strict=True)],
            )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("text", "scope"), ALL)
def test_solvers(name, text, scope, example):
    pattern = parsed(text, scope)
    every = cases(example, fitting_shape(text))
    check_solver(solvers[name](), pattern, every, sparsities(pattern))


@pytest.mark.parametrize(("name", "bits"), ROUNDING)
@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_rounding(name, bits, text, example):
    solver = solvers[name](bits=bits, **({"group": 32} if bits < 8 else {}))
    check_solver(solver, parsed(text, None), cases(example, (12, 72)), [0.5])


@pytest.mark.parametrize("name", list(methods))
@pytest.mark.parametrize("count", [1, 4])
def test_methods(name, count, example):
    method = compose(name, "unstructured")
    every = cases(example, (16, 64), torch.bfloat16)[:count]
    weight, statistics = stacked(every)
    assert method.batched
    solve = method.solve
    check_equal(
        solve(weight, method.solver.prepare(statistics), statistics, 0.5),
        [solve(x.weight, method.solver.prepare(x.statistics), x.statistics, 0.5) for x in every],
    )


def test_one_matrix_that_float32_cannot_factorise_leaves_the_others_as_they_are():
    random = torch.Generator().manual_seed(0)
    many, few = (torch.randn(tokens, 48, generator=random) for tokens in (200, 12))
    grams = torch.stack([x.t() @ x for x in (many, few, 2 * many)])
    weight = torch.randn(3, 8, 48, generator=random)
    factors, _ = inverse_factor(grams, 1e-6)
    targets = dense_target(grams, weight @ grams, weight, 1e-7)
    errors = relative_output_error(weight, targets, grams)
    scale = grams.diagonal(dim1=1, dim2=2).sqrt()
    scaled = grams / scale[:, None] / scale[:, :, None]
    inverses = inverse(scaled, 0.001)
    for number, gram in enumerate(grams):
        own = weight[number]
        assert torch.equal(factors[number], inverse_factor(gram, 1e-6)[0])
        assert torch.equal(targets[number], dense_target(gram, own @ gram, own, 1e-7))
        assert torch.equal(errors[number], relative_output_error(own, targets[number], gram))
        assert torch.equal(inverses[number], inverse(scaled[number], 0.001))
