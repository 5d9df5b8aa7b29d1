"""Presets fill in what a recipe leaves open, and nothing else."""

from __future__ import annotations

import pytest

from secateur.errors import RecipeError
from secateur.recipes.prune import PruneRecipe, presets
from secateur.recipes.reading import build_recipe, filled_in
from secateur.sparsity.methods import compose


def recipe(**values):
    return build_recipe(PruneRecipe, {"model": "m", **values})


def test_without_a_method_the_recipe_is_balanced() -> None:
    found = recipe(sparsity=0.5)
    assert found.effort == "balanced"
    assert found.method == presets["balanced"]["method"]
    assert found.asymmetric is presets["balanced"]["asymmetric"]


@pytest.mark.parametrize(
    "given", [{"method": "wanda"}, {"score": "ria"}, {"solver": "obs", "score": "ria"}]
)
def test_a_method_without_an_effort_is_only_that_method(given) -> None:
    found = recipe(sparsity=0.5, **given)
    assert found.effort is None
    assert found == PruneRecipe.model_validate({"model": "m", "sparsity": 0.5, **given})


def test_what_is_given_is_kept() -> None:
    distillation = {"peak_learning_rate": 0.01}
    found = recipe(effort="best", distillation=distillation, asymmetric=False)
    assert found.distillation.peak_learning_rate == 0.01
    assert found.distillation.epochs == presets["best"]["distillation"]["epochs"]
    assert found.distillation.tokens == presets["best"]["distillation"]["tokens"]
    assert found.asymmetric is False
    assert found.method_parameters == presets["best"]["method_parameters"]


def test_a_method_with_an_effort_gets_the_rest_but_not_another_methods_parameters() -> None:
    found = recipe(effort="best", method="wanda")
    assert (found.method, found.method_parameters) == ("wanda", {})
    assert found.distillation.epochs == presets["best"]["distillation"]["epochs"]


@pytest.mark.parametrize("effort", [*presets])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "16x1"])
def test_a_resolved_recipe_reads_as_itself_and_can_be_composed(effort: str, pattern: str) -> None:
    found = recipe(effort=effort, pattern=pattern)
    again = build_recipe(PruneRecipe, found.model_dump(mode="json"))
    assert again == found
    compose(found.method, pattern, refine=found.refine, **found.method_parameters)


@pytest.mark.parametrize(
    ("given", "allocation"),
    [
        ({}, "divergence"),
        ({"pattern": "4x4"}, "divergence"),
        ({"pattern": "2:4"}, "uniform"),
        ({"scope": "global"}, "uniform"),
        ({"allocation": "owl"}, "owl"),
    ],
)
def test_an_allocation_only_where_there_is_something_to_allocate(
    given: dict[str, str], allocation: str
) -> None:
    assert recipe(effort="balanced", **given).allocation == allocation


def test_a_section_that_is_no_mapping_is_a_fault_not_a_crash() -> None:
    with pytest.raises(RecipeError, match="calibration"):
        recipe(effort="best", calibration="c4")


def test_an_unknown_effort_gets_a_near_name() -> None:
    with pytest.raises(
        RecipeError, match="must be fast, balanced, thorough or best; did you mean balanced"
    ):
        recipe(effort="balancd")


def test_parameters_alone_are_added_to_those_of_the_preset():
    found = filled_in(
        {"effort": "best", "method_parameters": {"bits": 4, "iterations": 7}}, presets
    )
    assert found["method"] == "alps"
    assert found["method_parameters"] == {"iterations": 7, "growth": 1.6, "bits": 4}
    asked = {"effort": "best", "method": "sparsegpt", "method_parameters": {"bits": 4}}
    assert "iterations" not in filled_in(asked, presets)["method_parameters"]
