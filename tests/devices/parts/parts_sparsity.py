"""The tensor maths: scores, statistics, patterns, solvers, refinements, roundings, fits."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from pretended import counted

from contracts.pattern_examples import ALL, EXAMPLES, fitting_shape, parsed
from secateur.calibration.statistics import CrossGram, statistics
from secateur.errors import PatternError
from secateur.sparsity import shifted_inverse
from secateur.sparsity.hessian import dense_target, inverse_factor, relative_output_error
from secateur.sparsity.methods import compose, methods
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.sparsity.solvers.obs import OBS

NEAR = {"rtol": 2e-3, "atol": 2e-4}


def share(pattern) -> float:
    return 0.5 if pattern.sparsity is None else pattern.sparsity


def key(text: str, scope: str | None) -> str:
    return text if scope is None else f"{text}-{scope}"


PATTERNS = [pytest.param(*case, id=key(*case)) for case in ALL]
OF_EACH_KIND = [pytest.param(*cases[0], id=key(*cases[0])) for cases in EXAMPLES.values()]


@pytest.mark.parametrize("name", list(scores))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_score(name, dtype, example, both):
    case = example((12, 24), dtype=dtype, dead=2)
    both(scores[name](), case.weight, case.statistics)


@pytest.mark.parametrize("name", list(statistics))
def test_statistic(name, both):
    def gathered(first, second):
        one, other = (statistics[name]((40, 24), x.device) for x in (first, second))
        one.update(first)
        other.update(second)
        one.merge(other)
        from_elsewhere = statistics[name]((40, 24))  # another process, on its CPU
        from_elsewhere.update(second.cpu())
        one.merge(from_elsewhere)
        return one.value()

    both(gathered, torch.randn(40, 24), torch.randn(40, 24))


@pytest.mark.parametrize(("text", "scope"), PATTERNS)
def test_pattern(text, scope, both):
    pattern = parsed(text, scope)
    both(lambda score: pattern.mask(score, share(pattern)), torch.rand(fitting_shape(text)))
    if ":" not in text:
        both(pattern.units, torch.rand(fitting_shape(text)))


def test_pattern_of_one_long_row(both):
    pattern = parsed("unstructured", "layer")
    score = torch.randint(0, 40, (300, 400)).float()  # ties everywhere
    both(lambda x: pattern.mask(x, 0.5), score)


@pytest.mark.parametrize("name", list(solvers))
@pytest.mark.parametrize(("text", "scope"), OF_EACH_KIND)
def test_solver(name, text, scope, example, both):
    solver, pattern = solvers[name](), parsed(text, scope)
    case = example(fitting_shape(text), dead=1)
    mask = pattern.mask(case.weight.abs(), share(pattern))

    def holding(weight, known, kept):
        solved = solver.solve(weight, solver.prepare(known), kept)
        return solved.weight, solved.mask, solved.error, solved.shift

    def choosing(weight, known):
        solved = solver.choose(weight, solver.prepare(known), pattern, share(pattern))
        return solved.weight, solved.mask, solved.error

    both(holding, case.weight, case.statistics, mask, **NEAR)
    if solver.selects_by is not None and solver.whole_units <= pattern.whole_units:
        try:
            choosing(case.weight, case.statistics)
        except PatternError:
            return
        both(choosing, case.weight, case.statistics, **NEAR)


@pytest.mark.parametrize("name", list(refinements))
@pytest.mark.parametrize(("text", "scope"), OF_EACH_KIND)
def test_refinement(name, text, scope, example, both):
    refinement, pattern = refinements[name](), parsed(text, scope)
    case = example(fitting_shape(text))
    mask = pattern.mask(case.weight.abs(), share(pattern))

    def refined(weight, mask, known):
        return refinement.refine(weight, mask, known, pattern, share(pattern))

    try:
        refined(case.weight, mask, case.statistics)
    except PatternError:
        return
    both(refined, case.weight, mask, case.statistics)


@pytest.mark.parametrize("name", list(methods))
def test_method(name, example, both):
    method = compose(name, "2:4")
    case = example((16, 32))

    def solved(weight, known):
        found = method.solve(weight, method.solver.prepare(known), known, 0.5)
        return found.weight, found.mask

    both(solved, case.weight, case.statistics, **NEAR)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wanda", "unstructured"),
        ("sparsegpt", "unstructured"),
        ("sparsegpt", "2:4"),
        ("alps", "unstructured"),
    ],
)
def test_a_batch_launches_and_waits_as_often_as_one_matrix(name, text, example):
    """But for ALPS, where what has ended leaves the batch, and the last one decides."""
    method, asked = compose(name, text), []
    for count in (2, 4, 8):
        cases = [example((16, 64), seed=seed) for seed in range(count)]
        weight = torch.stack([x.weight for x in cases]).to("cuda")
        names = cases[0].statistics
        known = {n: torch.stack([x.statistics[n] for x in cases]).to("cuda") for n in names}
        with counted() as traffic:
            method.solve(weight, method.prepare(known), known, 0.5)
        asked.append((traffic.launches, traffic.waits))
    if name == "alps":
        assert asked[-1][0] < 1.5 * asked[0][0]
        assert asked[-1][1] < 1.5 * asked[0][1]
    else:
        assert len(set(asked)) == 1


def test_rounding_to_int8(example, both):
    solver, pattern = OBS(bits=8), parsed("unstructured", None)
    case = example((12, 24))
    mask = pattern.mask(case.weight.abs(), 0.5)

    def rounded(weight, known, kept):
        return solver.solve(weight, solver.prepare(known), kept).weight

    both(rounded, case.weight, case.statistics, mask, rtol=0.05, atol=0.02)


def test_large_inverses_begin_with_cholesky(monkeypatch, both):
    x = torch.randn(90, 40)
    x /= x.norm(dim=0)
    monkeypatch.setattr(shifted_inverse, "_NO_HALVES", 40)
    both(lambda matrix: shifted_inverse.inverse(matrix, 0.1), x.t() @ x)
    halves = Mock(return_value=None)
    monkeypatch.setattr(shifted_inverse, "_by_halves", halves)
    shifted_inverse.inverse((x.t() @ x).to("cuda"), 0.1)
    assert not halves.called


def test_target_of_the_dense_model(example, both):
    case = example((12, 24))

    def target(weight, inputs, gram):
        moments = CrossGram(12, 24, weight.device)
        moments.update(inputs @ weight.t(), inputs)
        found = dense_target(gram, moments.value(), weight, 0.01)
        return found, relative_output_error(weight, found, gram), inverse_factor(gram, 0.01)

    both(target, case.weight, case.inputs, case.statistics["gram"], **NEAR)
