"""What `compose` returns, `prune` accepts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from weight_files import digest
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError
from secateur.recipes.methods_of import keys_of
from secateur.sparsity.methods import compose
from secateur.sparsity.scores import scores

COMPOSED = [
    (("wanda", "2:4"), {}),
    (("wanda", "unstructured"), {}),
    (("magnitude", "unstructured", "global"), {}),
    (("ria", "unstructured"), {"a": 0.25, "refine": "swaps", "candidates": 4}),
    ((None, "4x2"), {"score": "wanda", "solver": "admm", "rho": 2.0}),
    ((None, "*x1"), {"score": "obs", "solver": "osscar", "damping": 0.1}),
    (("alps", "unstructured", "row"), {"iterations": 15, "growth": 1.6}),
]


@pytest.mark.parametrize(("given", "named"), COMPOSED)
def test_the_keys_of_a_method_compose_it_again(given: tuple, named: dict) -> None:
    method = compose(*given, **named)
    keys = keys_of(method)
    parameters = keys.pop("method_parameters")
    name, pattern = keys.pop("method"), keys.pop("pattern")
    assert compose(name, pattern, **keys, **parameters) == method


def test_a_loaded_model_is_pruned_as_by_the_names() -> None:
    by_name, by_method = tiny_model("llama"), tiny_model("llama")
    secateur.prune(by_name, method="wanda", pattern="2:4", calibration=tiny_windows())
    method = secateur.compose("wanda", "2:4")
    secateur.prune(by_method, method=method, calibration=tiny_windows())
    for name, parameter in by_name.named_parameters():
        assert torch.equal(parameter, by_method.get_parameter(name)), name


def test_a_checkpoint_is_pruned_as_by_the_names(tmp_path: Path) -> None:
    source, text = save_tiny(tmp_path / "source", "llama"), tmp_path / "windows.safetensors"
    save_windows(tiny_windows(), text)
    method = secateur.compose("ria", "unstructured", a=0.25)
    common = {"sparsity": 0.5, "calibration": str(text)}
    secateur.prune(source, output=tmp_path / "a", method=method, **common)
    secateur.prune(
        source, output=tmp_path / "b", method="ria", method_parameters={"a": 0.25}, **common
    )
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    recipe = (tmp_path / "a" / "secateur" / "recipe.yaml").read_text()
    assert "a: 0.25" in recipe
    assert secateur.prune(str(source), dry_run=True, method=method, **common).plan.peak_bytes > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pattern": "4:8"}, "`pattern`: '2:4', not '4:8'"),
        ({"solver": "obs"}, "`solver`: None, not 'obs'"),
        ({"refine": "swaps"}, "`refine`: None, not 'swaps'"),
    ],
)
def test_an_option_that_contradicts_the_method_is_refused(given: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=f"already decides {said}"):
        secateur.prune(
            tiny_model("llama"), method=compose("wanda", "2:4"), calibration=tiny_windows(), **given
        )


def test_the_same_pattern_may_be_said_twice() -> None:
    model = tiny_model("llama")
    method = compose("wanda", "2:4")
    report = secateur.prune(model, method=method, pattern="2:4", calibration=tiny_windows())
    assert report.sparsity == 0.5


def test_a_part_that_no_recipe_can_name_is_refused() -> None:
    method = dataclasses.replace(compose("wanda", "2:4"), score=scores["ria"]())
    with pytest.raises(RecipeError, match="the method 'wanda'"):
        secateur.prune(tiny_model("llama"), method=method, calibration=tiny_windows())
