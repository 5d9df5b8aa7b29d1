"""Options that contradict each other, or change nothing, are refused."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.errors import RecipeError
from secateur.recipes.keywords import recipe_of
from secateur.recipes.options import example_of, options_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe, idle_lines
from secateur.recipes.verbs import VERBS, imported
from secateur.steps.prune.composition import method_of

KINDS = {verb.name: imported(verb.recipe) for verb in VERBS.values()}
REQUIRED = {"repo": "owner/name"}
OTHER: dict[Any, Any] = {bool: None, int: 33, float: 0.375, str: "other"}
"""A value that is no default, by the type of an option."""


@pytest.mark.parametrize("verb", [name for name, kind in KINDS.items() if options_of(kind)])
def test_the_example_of_set_in_the_help_works(verb: str) -> None:
    kind = KINDS[verb]
    example = example_of(kind)
    required = {o.name: REQUIRED.get(o.name, "m") for o in options_of(kind) if o.required}
    given = {
        "chain": {"model": "m", "steps": [{"compress": {}}]},
        "fit": {"model": "m", "max_size": "1MiB"},
        "report": {"runs": ("m",)},
    }.get(verb, required)
    key, _, value = example.partition("=")
    made = build_recipe(kind, given, [example])
    found: Any = made
    for name in key.split("."):
        found = getattr(found, name)
    assert str(found).lower() in (value.lower(), f"{value}.0")


def test_the_help_of_every_verb_has_its_own_example(secateur) -> None:
    for verb, kind in KINDS.items():
        if options_of(kind):
            assert example_of(kind) in " ".join(secateur(verb, "--help").out.split())


IDLE = [
    (verb, name)
    for verb, kind in KINDS.items()
    for name in kind.needs
]  # fmt: skip


@pytest.mark.parametrize(("verb", "name"), IDLE)
def test_an_option_that_needs_another_one_is_refused_alone(verb: str, name: str) -> None:
    kind = KINDS[verb]
    options = {option.name: option for option in options_of(kind)}
    option, others = options[name], kind.needs[name]
    assert set(others) <= options.keys()
    value = other_value(option)
    base = {"model": "m"} | ({"max_size": "1MiB"} if verb == "fit" else {})
    # without a preset nothing else is switched on
    off = {"score": "wanda"} if verb in ("prune",) else {}
    with pytest.raises(RecipeError, match=f"{name}: changes nothing without (one of )?{others[0]}"):
        recipe_of(kind, {**base, **off}, {name: value})


def other_value(option: Any) -> Any:
    """A value of the option's type that is not its default."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    if option.type is bool:
        return option.default == "off"
    special = {"compress_group_size": 32, "teacher_layers": (0, 1)}
    special |= {"device": "cpu", "max_memory": "6GiB"}
    return special.get(option.name, OTHER.get(option.type, ("other",)))


def test_a_preset_can_switch_on_what_an_option_needs() -> None:
    values = {"model": "m", "effort": "best", "distillation": {"tokens": 4096}}
    assert build_recipe(PruneRecipe, values).distillation.tokens == 4096
    with pytest.raises(RecipeError, match=r"tokens: changes nothing without distillation.epochs"):
        build_recipe(PruneRecipe, {**values, "effort": "fast"})


def test_what_switches_another_option_off_may_leave_its_details() -> None:
    taught = {"distill_epochs": 1, "distill_tokens": 4096}
    base = {"model": "m", "sparsity": 0.5}
    assert not recipe_of(PruneRecipe, base, {**taught, "distill_epochs": 0})[0].distillation.epochs
    in_file = {**base, "distillation": {"epochs": 0, "tokens": 4096}}
    assert build_recipe(PruneRecipe, in_file).distillation.tokens == 4096
    flag = {("distillation", "tokens"): "--distill-tokens"}
    with pytest.raises(RecipeError, match="--distill-tokens: changes nothing without --distill-ep"):
        build_recipe(PruneRecipe, in_file, spelled=flag)


def test_a_written_recipe_with_all_its_defaults_can_be_read() -> None:
    for kind in KINDS.values():
        if not options_of(kind) or "model" not in kind.model_fields:
            continue
        given = {o.name: REQUIRED.get(o.name, "m") for o in options_of(kind) if o.required}
        given |= {"max_size": "1MiB"} if kind is KINDS["fit"] else {}
        given |= {"steps": [{"compress": {}}]} if kind is KINDS["chain"] else {}
        recipe = build_recipe(kind, given)
        written = recipe.model_dump(mode="json")
        assert build_recipe(kind, written) == recipe
        assert not idle_lines(recipe, written, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "wanda", "score": "magnitude"}, "'wanda' has the score 'wanda', but 'magnit"),
        ({"method": "wanda", "solver": "obs"}, "'wanda' has the solver 'zero', but 'obs' is given"),
        ({"method": "sparsegpt", "score": "wanda"}, "'sparsegpt' has the score 'obs'"),
    ],
)
def test_a_method_has_its_own_score_and_solver(given: dict[str, str], message: str) -> None:
    recipe = build_recipe(PruneRecipe, {"model": "m", "sparsity": 0.5, **given})
    with pytest.raises(RecipeError, match=message):
        method_of(recipe)


def test_a_method_with_its_own_parts_is_no_contradiction() -> None:
    given = {"model": "m", "sparsity": 0.5, "method": "wanda", "score": "wanda", "solver": "zero"}
    assert method_of(build_recipe(PruneRecipe, given))[0].name == "wanda"
    given = {"model": "m", "sparsity": 0.5, "score": "wanda", "solver": "obs", "scope": "row"}
    assert method_of(build_recipe(PruneRecipe, given))[0].name == "wanda+obs"
