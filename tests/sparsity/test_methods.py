"""The famous names, and what may be put together."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from secateur.errors import PatternError, RecipeError
from secateur.sparsity.methods import compose, methods
from secateur.sparsity.refinements import refinements
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers


@pytest.mark.parametrize("name", list(methods))
def test_every_name_composes(name):
    named = methods[name]
    method = compose(name, "unstructured")
    assert method.name == name
    assert (method.score_name, method.solver_name) == (named.score, named.solver)
    assert isinstance(method.score, scores[named.score])
    assert isinstance(method.solver, solvers[named.solver])
    assert method.pattern.scope == named.scope
    assert named.description
    assert named.paper


def test_scopes_are_those_of_the_papers():
    scopes = {name: named.scope for name, named in methods.items()}
    assert scopes.pop("wanda") == "row"
    assert set(scopes.values()) == {"layer"}


@pytest.mark.parametrize(
    ("arguments", "requires", "selects"),
    [
        ({"method": "magnitude"}, set(), False),
        ({"method": "wanda"}, {"column_norm"}, False),
        ({"method": "ria"}, {"column_norm"}, False),
        ({"method": "taylor"}, {"gradient"}, False),
        ({"method": "obd"}, {"fisher"}, False),
        ({"method": "obs"}, {"gram"}, False),
        ({"method": "sparsegpt"}, {"gram"}, True),
        ({"method": "sparsegpt", "score": "wanda"}, {"gram", "column_norm"}, False),
        ({"method": "taylor", "solver": "obs"}, {"gram", "gradient"}, False),
        ({"method": None, "score": "wanda"}, {"column_norm"}, False),
    ],
)
def test_what_must_be_gathered(arguments, requires, selects):
    method = compose(pattern_text="unstructured", **arguments)
    assert method.requires == requires
    assert method.solver_selects is selects


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"method": "wanda", "solver": "obs"}, "wanda+obs"),
        ({"method": "sparsegpt", "score": "ria"}, "ria+obs"),
        ({"method": None, "score": "obs", "solver": "obs"}, "sparsegpt"),
        ({"method": None, "score": "ria"}, "ria"),
        ({"method": "sparsegpt", "solver": "zero"}, "obs"),
    ],
)
def test_names_say_what_is_done(arguments, name):
    assert compose(pattern_text="2:4", **arguments).name == name


def test_scope():
    assert compose("wanda", "unstructured", scope="layer").pattern.scope == "layer"
    assert compose("wanda", "2:4").pattern.scope == "group"
    assert compose("wanda", "16x1").pattern.scope == "layer"
    assert compose(None, "unstructured", score="wanda").pattern.scope == "row"
    assert compose("wanda", "unstructured", solver="obs").pattern.scope == "row"
    assert compose("magnitude", "32x32", scope="global").pattern.scope == "global"


def test_parameters_reach_their_parts():
    method = compose("sparsegpt", "unstructured", damping=0.1, block_columns=64)
    assert (method.score.damping, method.solver.damping, method.solver.block_columns) == (
        0.1,
        0.1,
        64,
    )
    assert compose("ria", "2:4", a=1).score.a == 1
    assert compose("wanda", "2:4", solver="obs", damping=0.2).solver.damping == 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "wandaa"}, r"did you mean 'wanda'"),
        ({"method": "ria", "score": "wnda"}, r"did you mean 'wanda'"),
        ({"method": "ria", "solver": "obss"}, r"did you mean 'obs'"),
        ({"method": "wanda", "refine": "swap"}, "swaps"),
        ({"method": None}, "neither a method nor a score"),
        ({"method": "sparsegpt", "dampening": 0.1}, r"no parameter 'dampening'(.|\n)*'damping'"),
        ({"method": "wanda", "damping": 0.1}, "no parameter 'damping'"),
        ({"method": "sparsegpt", "damping": -1.0}, "damping is -1.0"),
        ({"method": "sparsegpt", "damping": "much"}, "damping is 'much'"),
        ({"method": "sparsegpt", "block_columns": 64.5}, "block_columns is 64.5"),
        ({"method": "sparsegpt", "block_columns": True}, "block_columns is True"),
        ({"method": "sparsegpt", "block_columns": 0}, "block_columns is 0"),
        ({"method": "ria", "a": float("nan")}, "a is nan"),
    ],
)
def test_impossible_methods(arguments, said):
    with pytest.raises(RecipeError, match=said):
        compose(pattern_text="unstructured", **arguments)


@pytest.mark.parametrize(
    ("text", "scope", "said"),
    [
        ("2:4", "row", "compete within each group of 4"),
        ("2:4", "global", "compete within each group of 4"),
        ("4:2", None, "keep 4 of every 2"),
        ("4:4", None, "1 <= N < M"),
        ("0:4", None, "keep 0 of every 4"),
        ("16x1", "row", "cannot compete within a row"),
        ("16x1", "group", "no scope 'group'"),
        ("0x4", None, "no weights"),
        ("unstructured", "group", "no scope 'group'"),
        ("unstructured", "rows", "did you mean 'row'"),
        ("structured", None, "no pattern is written"),
        ("2:4:8", None, "no pattern is written"),
        ("", None, "no pattern is written"),
    ],
)
def test_impossible_patterns(text, scope, said):
    with pytest.raises(PatternError, match=said):
        compose("wanda", text, scope=scope)


def test_a_method_of_functions_is_a_value() -> None:
    method = compose("ria", "2:4", refine="swaps", a=1, swaps=3)
    assert repr(method.score) == "ria(a=1.0)"
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    assert method != compose("ria", "2:4", refine="swaps", swaps=3)


def test_a_refinement_betters_the_mask_and_keeps_the_solver_from_choosing() -> None:
    plain = compose("sparsegpt", "2:4")
    refined = compose("sparsegpt", "2:4", refine="swaps", swaps=3)
    assert plain.solver_selects
    assert not refined.solver_selects
    assert refined.refinement == refinements["swaps"](swaps=3)
    assert refined.name == "sparsegpt+swaps"
    assert refined.requires == {"gram"}
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 16, generator=draw), torch.randn(40, 16, generator=draw)
    statistics = {"gram": x.t() @ x}
    first = plain.pattern.mask(plain.score(weight, statistics), 0.5)
    prepared = refined.solver.prepare(statistics)
    better = refined.solve(weight, prepared, statistics, 0.5).mask
    assert not torch.equal(first, better)
    assert ((better * weight - weight) @ x.t()).norm() < ((first * weight - weight) @ x.t()).norm()
