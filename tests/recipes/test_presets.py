"""Presets, and the texts of a sample, fill in what a recipe leaves open, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import RecipeError
from secateur.models.samples import MODELS, TEXTS
from secateur.recipes.options import options_of
from secateur.recipes.prune import PruneRecipe, presets
from secateur.recipes.reading import build_recipe, filled_in
from secateur.recipes.verbs import VERBS, imported
from secateur.sparsity.methods import compose
from secateur.steps.chain import checked_steps


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


def test_parameters_alone_are_added_to_those_of_the_preset():
    found = filled_in(
        {"effort": "best", "method_parameters": {"bits": 4, "iterations": 7}}, presets
    )
    assert found["method"] == "alps"
    assert found["method_parameters"] == {"iterations": 7, "growth": 1.6, "bits": 4}
    asked = {"effort": "best", "method": "sparsegpt", "method_parameters": {"bits": 4}}
    assert "iterations" not in filled_in(asked, presets)["method_parameters"]


SAMPLE = "smollm2-135m"
REQUIRED = {
    "fit": {"max_size": "1GB"},
    "structure": {"ffn": 0.9},
    "sweep": {"sparsities": (0.5,)},
}


def texts_in(verb: str, model: str, **given) -> dict[str, object]:
    """The texts that a recipe reads by default, and where it says so."""
    kind = imported(VERBS[verb].recipe)
    made = build_recipe(kind, {"model": model, **REQUIRED.get(verb, {}), **given})
    found = {option.key: option.flag.own_text for option in options_of(kind)}
    values = made.model_dump()
    return {
        key: values[section][name] if name else values[section]
        for key, own in found.items()
        if own
        for section, _, name in [key.partition(".")]
    }


@pytest.mark.parametrize(
    ("verb", "usual", "own"),
    [
        *((verb, ["c4"], [TEXTS[0]]) for verb in ("prune", "structure", "fit", "draft")),
        ("train", [("c4",)], [(TEXTS[0],)]),
        ("sweep", [("wikitext2",), "c4"], [(TEXTS[1],), TEXTS[0]]),
        ("compress", [None], [None]),
    ],
)
def test_a_sample_brings_its_texts(
    verb: str, usual: list[object], own: list[object], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(sample.texts and {*sample.texts} <= {*TEXTS} for sample in MODELS.values())
    assert sorted(map(str, texts_in(verb, SAMPLE).values())) == sorted(map(str, own))
    for other in ("m", "org/name"):
        assert sorted(map(str, texts_in(verb, other).values())) == sorted(map(str, usual))
    (tmp_path / SAMPLE).mkdir()  # a folder of that name is what the name means
    assert sorted(map(str, texts_in(verb, SAMPLE).values())) == sorted(map(str, usual))


@pytest.mark.parametrize("verb", ["prune", "structure", "compress", "fit"])
def test_a_text_that_is_named_is_read(verb: str) -> None:
    values = {"values": "int4"} if verb == "compress" else {}
    for given, own, usual in (("c4", "c4", "c4"), ("auto", TEXTS[0], "c4")):
        section = {"calibration": {"source": given, "windows": 4}}
        assert texts_in(verb, SAMPLE, **section, **values) == {"calibration.source": own}
        assert texts_in(verb, "m", **section, **values) == {"calibration.source": usual}


def test_every_step_of_a_chain_has_the_texts_of_its_model() -> None:
    steps = [{"structure": {"ffn": 0.9}}, {"prune": {"sparsity": 0.5}}, {"train": {"steps": 1}}]
    cut, pruned, trained = checked_steps(steps, SAMPLE)
    assert cut.recipe.calibration.source == pruned.recipe.calibration.source == TEXTS[0]
    assert trained.recipe.text == (TEXTS[0],)
