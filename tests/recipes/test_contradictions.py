"""Options that contradict each other, or change nothing, are refused."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.errors import RecipeError
from secateur.recipes.keywords import recipe_of
from secateur.recipes.methods_of import method_of
from secateur.recipes.options import all_options, options_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_call, build_recipe, idle_lines, recipe_from_flags
from secateur.recipes.verbs import VERBS, imported

KINDS = {verb.name: imported(verb.recipe) for verb in VERBS.values()}
REQUIRED = {"repo": "owner/name"}
SENSIBLE: dict[str, dict[str, Any]] = {
    "chain": {"steps": [{"compress": {}}]},
    "diagnose": {"model": "m"},
    "fit": {"max_size": "1MiB"},
    "structure": {"layers_list": "0"},
}
"""What a recipe needs besides what every recipe of the verb needs."""
OTHER: dict[Any, Any] = {bool: None, int: 33, float: 0.375, str: "other", int | float | str: 33}
"""A value that is no default, by the type of an option."""


def sensible(verb: str) -> dict[str, Any]:
    """Values with which a recipe of the verb can be built."""
    required = [option for option in options_of(KINDS[verb]) if option.required]
    values = {option.name: REQUIRED.get(option.name, "m") for option in required}
    return {**values, **({"runs": ("m",)} if verb == "report" else {}), **SENSIBLE.get(verb, {})}


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
    base = sensible(verb)
    # without a preset nothing else is switched on
    off = {"score": "wanda"} if verb in ("prune",) else {}
    with pytest.raises(RecipeError, match=f"{name}: .*{others[0]}"):
        recipe_of(kind, {**base, **off}, {name: value})


def other_value(option: Any) -> Any:
    """A value of the option's type that is not its default."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    if option.type is bool:
        return option.default == "off"
    special = {"device": "cpu", "max_memory": "6GiB"}
    return special.get(option.name, OTHER.get(option.type, ("other",)))


def test_a_preset_can_switch_on_what_an_option_needs() -> None:
    values = {"model": "m", "effort": "best", "distillation": {"tokens": 4096}}
    assert build_recipe(PruneRecipe, values).distillation.tokens == 4096
    with pytest.raises(RecipeError, match=r"tokens: .*distillation\.epochs"):
        build_recipe(PruneRecipe, {**values, "effort": "fast"})


def test_what_switches_another_option_off_may_leave_its_details() -> None:
    taught = {"distill_epochs": 1, "distill_tokens": 4096}
    base = {"model": "m", "sparsity": 0.5}
    assert not recipe_of(PruneRecipe, base, {**taught, "distill_epochs": 0})[0].distillation.epochs
    in_file = {**base, "distillation": {"epochs": 0, "tokens": 4096}}
    assert build_recipe(PruneRecipe, in_file).distillation.tokens == 4096
    flag = {("distillation", "tokens"): "--distill-tokens"}
    with pytest.raises(RecipeError, match=r"--distill-tokens: .*--distill-epochs"):
        build_call(PruneRecipe, in_file, {}, spelled=flag)


def test_a_written_recipe_with_all_its_defaults_can_be_read() -> None:
    for verb, kind in KINDS.items():
        if not options_of(kind) or "model" not in kind.model_fields:
            continue
        recipe = build_recipe(kind, sensible(verb))
        written = recipe.model_dump(mode="json")
        assert build_recipe(kind, written) == recipe
        assert not idle_lines(recipe, written, {})


FLAGS = {"model": "m", "keep_format": True, "compress": "int8", "distill_epochs": "1"}


def test_all_conflicts_of_a_call_are_listed_at_once() -> None:
    call = {"resume": True, "restart": True, "asymmetric_damping": "0.3"}
    with pytest.raises(RecipeError) as error:
        recipe_from_flags(PruneRecipe, {**FLAGS, **call}, ["effort=fast"])
    first, *lines = error.value.what.splitlines()
    assert first == "4 faults:"
    assert [
        [word.strip(":") for word in line.split() if word.startswith("--")][:2] for line in lines
    ] == [
        ["--asymmetric-damping", "--asymmetric"],
        ["--keep-format", "--compress"],
        ["--keep-format", "--distill-epochs"],
        ["--resume", "--restart"],
    ]


@pytest.mark.parametrize("verb", [name for name, kind in KINDS.items() if kind.conflicts])
def test_every_row_of_conflicts_names_options(verb: str) -> None:
    names = {option.name for option in all_options(KINDS[verb])}
    run = KINDS[verb].run
    for row in (*KINDS[verb].conflicts, *(run.conflicts if run else ())):
        words = f"{row.option} or {row.other} or {row.unless}".split(" or ")
        assert {word.partition("=")[0] for word in words if word} <= names
        assert row.reason
        assert row.remedy


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("prune", {"asymmetric": True, "sequential": "layer"}, "asymmetric with sequential layer"),
        ("fit", {"max_size": "1MB", "decode_speedup": 2.0, "target": "llama.cpp"},
         "decode_speedup with target"),
        ("evaluate", {"tasks": ("piqa",), "windows": 4}, "windows with tasks"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    kind: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(KINDS[kind], {"model": "m"}, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "wanda", "score": "magnitude"}, "score 'wanda'"),
        ({"method": "wanda", "solver": "obs"}, "solver 'zero'"),
        ({"method": "sparsegpt", "score": "wanda"}, "score 'obs'"),
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


def default_words(option: Any, usual: Any) -> Any:
    """The default of an option as the words of a command line; None if it has none to write."""
    if isinstance(usual, bool):
        return usual
    if isinstance(usual, (tuple, list)):
        return [str(x) for x in usual] or None
    return None if usual in (None, {}) else str(usual)


DEFAULTS = [
    (verb, option, section)
    for verb, kind in KINDS.items()
    for section in filter(None, (kind, kind.run))
    for option in options_of(section)
    if not option.flag.hidden
]


@pytest.mark.parametrize(("verb", "option", "section"), DEFAULTS)
def test_an_option_with_its_default_is_read_or_refused_by_name(
    verb: str, option: Any, section: Any
) -> None:
    kind, value = KINDS[verb], section.model_construct()
    for key in option.path:
        value = getattr(value, key, None)
    words = default_words(option, value)
    base = {**sensible(verb), **({"ffn": "0.5"} if verb == "structure" else {})}
    steps = base.pop("steps", None)
    base.pop("layers_list", None)
    if words is None or option.name in base:
        return
    try:
        _, call = recipe_from_flags(
            kind, {**base, option.name: words}, [f"steps={steps}"] if steps else []
        )
    except RecipeError as error:
        assert f"{option.flag_text}: " in str(error)  # noqa: PT017
    else:  # what the runner takes
        assert call.keys() <= {"resume", "restart", "overwrite", "dry_run"}


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("prune", {"processes": "2"}, "--processes without --dry-run"),
        ("train", {"kind": "forward"}, "--kind: .*--teacher"),
        ("train", {"steps": "3", "epochs": "1"}, "--steps with --epochs"),
        ("bench", {"draft": "d", "rounds": "5"}, "--rounds with --draft"),
    ],
)
def test_a_flag_with_its_default_counts_as_given(
    verb: str, given: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from_flags(KINDS[verb], {"model": "m", **given})
