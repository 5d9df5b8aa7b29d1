"""The pure part of allocation: exact budgets, trades, searches, formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import allocation as oracle
from secateur.errors import PatternError, RecipeError
from secateur.sparsity.allocation.budget import Granularity, settle
from secateur.sparsity.allocation.divergence import ByDivergence
from secateur.sparsity.allocation.global_threshold import GlobalThreshold, global_threshold
from secateur.sparsity.allocation.layer_sensitivity import LayerSensitivity
from secateur.sparsity.allocation.owl import OWL
from secateur.sparsity.allocation.search import Search, ladders, mutate
from secateur.sparsity.evolution import Leader
from secateur.sparsity.patterns import parse_pattern

PATTERNS = [("unstructured", "row"), ("unstructured", "layer"), ("3x2", "layer")]
LLAMA = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def grains_of(shapes, pattern, sparsity: float, reach: float) -> dict[str, Granularity]:
    return {
        f"linear {i}": Granularity.around(
            shape, pattern.step(shape), pattern.pruned(shape, sparsity), sparsity, reach
        )
        for i, shape in enumerate(shapes)
    }


def pruned_weights(shapes, pattern, shares: Mapping[str, float]) -> int:
    return sum(pattern.pruned(shape, shares[f"linear {i}"]) for i, shape in enumerate(shapes))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 13), st.integers(1, 29)), min_size=1, max_size=9),
    which=st.sampled_from(PATTERNS),
    sparsity=st.one_of(st.sampled_from([0.0, 0.5, 0.7, 0.99]), st.floats(0, 0.999)),
    reach=st.sampled_from([0.05, 0.15, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_wish_costs_exactly_the_uniform_budget(sizes, which, sparsity, reach, seed):
    pattern = parse_pattern(*which)
    shapes = [(3 * a, 2 * b) if which[0] == "3x2" else (a, b) for a, b in sizes]
    grains = grains_of(shapes, pattern, sparsity, reach)
    random = Random(seed)
    ideal = {name: random.uniform(-0.5, 1.5) for name in grains}
    shares = settle(ideal, grains)
    uniform = sum(pattern.pruned(shape, sparsity) for shape in shapes)
    assert pruned_weights(shapes, pattern, shares) == uniform
    for name, grain in grains.items():
        assert grain.lowest <= round(shares[name] * grain.units) <= grain.highest


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_a_wish_that_fits_is_met_to_a_unit(scope):
    pattern = parse_pattern("unstructured", scope)
    shapes = LLAMA * 4
    grains = grains_of(shapes, pattern, 0.5, 0.2)
    random = Random(0)
    ideal = {name: 0.5 + random.uniform(-0.1, 0.1) for name in grains}
    totals = [grain.total for grain in grains.values()]
    excess = sum((s - 0.5) * t for s, t in zip(ideal.values(), totals, strict=True)) / sum(totals)
    shares = settle(ideal, grains)
    for name, grain in grains.items():
        # With scope row, linears of 192 rows take up the rest that those of 1536 leave.
        off = abs(shares[name] - (ideal[name] - excess)) * grain.units
        assert off < (2 if scope == "row" else 1.01)
    assert pruned_weights(shapes, pattern, shares) == sum(totals) // 2


def test_a_rest_that_no_unit_can_take_up_draws_the_wish_to_uniform():
    # 7 and 5 weights a unit: only uniform, or 5 units of one against 7 of the other.
    grains = {"a": Granularity(4, 7, 2, 0, 3), "b": Granularity(4, 5, 2, 0, 3)}
    assert settle({"a": 0.9, "b": 0.1}, grains) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("ideal", [{"a": math.nan}, {}, {"a": 0.5, "b": 0.5}])
def test_an_allocation_of_something_else_is_refused(ideal):
    with pytest.raises(RecipeError, match="allocation"):
        settle(ideal, {"a": Granularity(4, 1, 2, 0, 3)})


scores = st.one_of(st.sampled_from([0.0, 1.0, 2.0, math.inf]), st.floats(0, 1e6, width=32))


@settings(max_examples=70, deadline=None)
@given(lists=st.lists(st.lists(scores, max_size=12), min_size=1, max_size=5), data=st.data())
def test_bounded_threshold_equals_pruning_one_after_the_other(lists, data):
    tensors = {f"layer {i}": torch.tensor(x, dtype=torch.float32) for i, x in enumerate(lists)}
    bounds = {}
    for name, tensor in tensors.items():
        low = data.draw(st.integers(0, len(tensor)))
        bounds[name] = (low, data.draw(st.integers(low, len(tensor))))
    least, most = (sum(b[i] for b in bounds.values()) for i in (0, 1))
    pruned = data.draw(st.integers(least, most))
    counts = global_threshold(lambda: iter(tensors.items()), pruned, bounds)
    assert counts == oracle.bounded_threshold(tensors, pruned, bounds)


def test_bounds_that_do_not_hold_the_budget_are_refused():
    tensors = {"a": torch.ones(6)}
    with pytest.raises(PatternError, match="2 to 4"):
        global_threshold(lambda: iter(tensors.items()), 5, {"a": (2, 4)})


class Layer:
    """A decoder layer made up for a test."""

    def __init__(self, weights, statistics, grains, solve=None):
        self.weights, self.statistics, self.grains, self.fixed = weights, statistics, grains, {}
        self.tokens = dict.fromkeys(weights, 64)
        self._solve = solve

    def score(self, name):
        return self.weights[name].abs()

    def solve(self, name, sparsity, *, quick=False):
        return self._solve(name, sparsity)

    def solve_all(self, sparsities, *, quick=False):
        return {name: self.solve(name, sparsity) for name, sparsity in sparsities.items()}


def test_owl_is_its_formula():
    random = torch.Generator().manual_seed(0)
    pattern, shapes = parse_pattern("unstructured"), [(12, 9), (7, 12)]
    layers, kept, grains = [], [], {}
    for index in range(4):
        weights = {
            f"{index}.{i}": torch.randn(s, generator=random) ** (1 + 2 * (index % 3))
            for i, s in enumerate(shapes)
        }
        norms = {n: torch.rand(w.shape[1], generator=random) for n, w in weights.items()}
        statistics = {n: {"column_norm": x} for n, x in norms.items()}
        for name, w in weights.items():
            shape = tuple(w.shape)
            grains[name] = Granularity.around(
                shape, 1, pattern.pruned(shape, 0.7), 0.7, OWL().reach
            )
        layers.append([(weights[n], norms[n]) for n in weights])
        kept += OWL().observe(Layer(weights, statistics, grains)).items()
    ideal = OWL().allocate(lambda: iter(kept), grains, 0.7)
    expected = oracle.owl(layers, 0.7, 5.0, 0.08)
    assert max(expected) - min(expected) == pytest.approx(0.16)
    for name, share in ideal.items():
        assert share == pytest.approx(expected[int(name[0])], abs=1e-12)
    shares = settle(ideal, grains)
    for name, share in shares.items():  # the rounding of 8 small matrices
        assert share == pytest.approx(ideal[name], abs=1.5 / grains[name].units)


def mixture(share, outliers):
    """Attention that sees 4096 tokens and 16 experts, the e-th of which sees this share of them."""
    random = torch.Generator().manual_seed(7)
    weights, statistics, tokens = {}, {}, {}
    for name in ("attention", *range(16)):
        key, seen = str(name), 4096 if name == "attention" else round(4096 * share(name))
        weights[key], tokens[key] = torch.randn(48, 64, generator=random), seen
        rms = torch.ones(64)
        rms[:outliers] = 20.0
        statistics[key] = {"column_norm": rms * seen**0.5}
    layer = Layer(weights, statistics, {})
    layer.tokens = tokens
    return layer


def test_owl_finds_outliers_in_mixtures_however_tokens_are_spread():
    even, uneven = (lambda e: 1 / 4), (lambda e: (1, 1, 1, *[1 / 13] * 13)[e])
    found = {}
    for name, share in (("even", even), ("uneven", uneven)):
        for outliers in (0, 1):
            layer = mixture(share, outliers)
            found[name, outliers] = float(OWL().observe(layer)["attention"])
            dense = mixture(lambda e: 1, outliers)
            assert found[name, outliers] == float(OWL().observe(dense)["attention"])
    assert found["even", 0] == found["uneven", 0] < 1e-4
    assert found["even", 1] == found["uneven", 1] > 1e-2


def test_owl_of_equal_layers_is_uniform():
    kept = [("a", torch.tensor(0.1)), ("b", torch.tensor(0.1))]
    grains = {n: Granularity(10, 1, 5, 3, 7) for n in "ab"}
    assert OWL().allocate(lambda: iter(kept), grains, 0.5) == {"a": 0.5, "b": 0.5}


def test_sensitivity_is_its_formula():
    random = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(6, 8, generator=random) for n in "abcde"}
    inputs = torch.randn(50, 8, generator=random)
    statistics = {n: {"gram": inputs.t() @ inputs} for n in weights}
    noise = {n: torch.randn(6, 8, generator=random) * (i % 3 + 1) for i, n in enumerate(weights)}
    asked = set()

    def solve(name, sparsity):
        asked.add(sparsity)
        return weights[name] + noise[name]

    grains = {n: Granularity(48, 1, 24, 19, 28) for n in weights}
    part = LayerSensitivity(half_range=0.1)
    kept = part.observe(Layer(weights, statistics, grains, solve))
    assert asked == {0.5}
    errors = [oracle.relative_error(w, w + noise[n], inputs) for n, w in weights.items()]
    assert [float(x) for x in kept.values()] == pytest.approx(errors, rel=1e-4)
    ideal = part.allocate(lambda: iter(kept.items()), grains, 0.6)
    assert list(ideal.values()) == pytest.approx(oracle.sensitivity(errors, 0.6, 0.1))
    tied = [(n, torch.tensor(1.0)) for n in "abc"]
    assert set(part.allocate(lambda: iter(tied), grains, 0.6).values()) == {0.6}


@settings(max_examples=40, deadline=None)
@given(
    measured=st.lists(
        st.tuples(st.integers(20, 200), st.floats(1e-5, 1e-1)), min_size=2, max_size=7
    ),
    sparsity=st.sampled_from([0.5, 0.6, 0.7]),
)
def test_divergence_prunes_where_the_sum_of_divergences_grows_least(measured, sparsity):
    sizes, divergences = ([x[i] for x in measured] for i in (0, 1))
    part = ByDivergence()
    grains = {
        str(i): Granularity.around((size, 10), 1, round(10 * size * sparsity), sparsity, part.reach)
        for i, size in enumerate(sizes)
    }
    kept = {
        str(i): torch.tensor(d / (10 * size), dtype=torch.float64)
        for i, (size, d) in enumerate(zip(sizes, divergences, strict=True))
    }
    shares = settle(part.allocate(kept.items, grains, sparsity), grains)
    expected = oracle.equal_slopes(
        divergences, [10 * size for size in sizes], sparsity, part.growth, part.reach
    )
    for share, count, size in zip(shares.values(), expected, sizes, strict=True):
        assert abs(share * 10 * size - count) < len(sizes) + 2


def test_linears_without_a_divergence_lose_most():
    kept = {"a": torch.tensor(1e-6), "b": torch.tensor(0.0), "c": torch.tensor(-1e-9)}
    shares = ByDivergence().allocate(kept.items, {}, 0.5)
    assert shares["b"] == shares["c"] > 0.5 > shares["a"]
    none = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
    assert ByDivergence().allocate(none.items, {}, 0.5) == {"a": 0.5, "b": 0.5}


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(2, 60)), min_size=2, max_size=9),
    scope=st.sampled_from(["row", "layer"]),
    sparsity=st.floats(0.02, 0.98),
    seed=st.integers(0, 10**6),
)
def test_mutations_keep_the_budget_and_the_levels(sizes, scope, sparsity, seed):
    pattern, shapes = parse_pattern("unstructured", scope), [*sizes, *sizes]
    part = Search()
    rungs = part.ladders(grains_of(shapes, pattern, sparsity, part.reach))
    random = Random(seed)
    budget = sum(pattern.pruned(shape, sparsity) for shape in shapes)
    errors = {name: random.random() for name in rungs}
    for candidate in (part.informed(errors, rungs), (0,) * len(rungs)):
        for _ in range(5):
            shares = {}
            for (name, rung), level in zip(rungs.items(), candidate, strict=True):
                assert rung.lowest <= level <= rung.highest
                shares[name] = rung.sparsity(level)
            assert pruned_weights(shapes, pattern, shares) == budget
            candidate = mutate(candidate, random, list(rungs.values()))


@pytest.mark.parametrize(
    ("scope", "worths"), [("row", [4, 1, 1, 4, 10, 10, 10]), ("layer", [3, 1, 1, 3, 8, 8, 8])]
)
def test_linears_of_different_size_trade(scope, worths):
    pattern = parse_pattern("unstructured", scope)
    rungs = ladders(grains_of(LLAMA * 3, pattern, 0.5, 0.175), 3, 0.05)
    worth = [rung.unit for rung in rungs.values()]
    assert [w / worth[1] for w in worth[:7]] == worths
    assert {(r.lowest, r.highest) for r in rungs.values()} == {(-3, 3)}
    random, moved = Random(0), set()
    for _ in range(200):
        mutant = mutate((0,) * len(worth), random, list(rungs.values()))
        changed = {w for w, level in zip(worth, mutant, strict=True) if level}
        moved.add(len(changed))
        assert sum(w * level for w, level in zip(worth, mutant, strict=True)) == 0
    assert {1, 2} <= moved


def toy(candidates, tokens, draw):
    """A landscape whose best candidate is known: (2, -2, 1, -1, 0, 0)."""
    best = (2, -2, 1, -1, 0, 0)
    return [float(sum((a - b) ** 2 for a, b in zip(c, best, strict=True))) for c in candidates]


def rungs_of(count: int):
    pattern = parse_pattern("unstructured")
    return list(ladders(grains_of([(40, 50)] * count, pattern, 0.5, 0.175), 3, 0.05).values())


def test_the_search_climbs_and_is_deterministic():
    part = Search(generations=40)
    whole = list(part.climb(rungs_of(6), (0,) * 6, toy))
    assert whole[-1].fitness == 0.0
    assert whole[-1].candidate == (2, -2, 1, -1, 0, 0)
    assert [s.generation for s in whole] == list(range(41))
    assert [s.fitness for s in whole] == sorted((s.fitness for s in whole), reverse=True)
    assert whole == list(part.climb(rungs_of(6), (0,) * 6, toy))
    other = list(Search(generations=40, seed=1).climb(rungs_of(6), (0,) * 6, toy))
    assert other != whole


def test_stages_see_ever_fewer_candidates_on_ever_more_tokens():
    calls = []

    def watched(candidates, tokens, draw):
        calls.append((len(candidates), tokens, draw))
        return toy(candidates, tokens, draw)

    part = Search(generations=2, offspring=6, stages=((3, 10), (2, 20), (1, 40)))
    list(part.climb(rungs_of(6), (1, -1, 0, 0, 0, 0), watched))
    assert calls == [
        (2, 40, 0), (6, 10, 0), (3, 20, 0), (2, 40, 0), (6, 10, 1), (3, 20, 1), (2, 40, 1),
    ]  # fmt: skip


def test_the_search_is_never_worse_than_uniform():
    # Whatever is measured early misleads; the last stage decides.
    def misleading(candidates, tokens, draw):
        sums = [float(sum(map(abs, c))) for c in candidates]
        return sums if tokens == 2048 else [-x for x in sums]

    best = list(Search().climb(rungs_of(6), (1, -1, 2, -2, 0, 0), misleading))[-1]
    assert best.candidate == (0,) * 6
    assert best.fitness == 0.0
    blind = Search().climb(rungs_of(6), (1, -1, 0, 0, 0, 0), lambda c, t, d: [math.nan] * len(c))
    assert list(blind)[-1].candidate == (0,) * 6


def test_a_model_with_nothing_to_trade_stays_uniform():
    best = list(Search().climb(rungs_of(1), (0,), lambda c, t, d: [1.0] * len(c)))[-1]
    assert best == Leader(16, (0,), 1.0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (OWL, {"half_range": 0.5}),
        (OWL, {"outlier_multiple": 0.0}),
        (LayerSensitivity, {"half_range": 0.2}),
        (LayerSensitivity, {"reference": 1.0}),
        (GlobalThreshold, {"reach": -0.1}),
        (ByDivergence, {"growth": 0.0}),
        (ByDivergence, {"reach": 0.0}),
        (ByDivergence, {"judged_tokens": 0}),
        (Search, {"levels": 0}),
        (Search, {"step": 0.5}),
    ],
)
def test_parameters_out_of_range_are_refused(kind, options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        kind(**options)
