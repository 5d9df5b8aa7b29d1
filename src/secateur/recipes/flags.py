"""Turn the words of a command line into a recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from secateur.errors import RecipeError
from secateur.recipes.options import Option, options_of, run_options_of, without_none
from secateur.recipes.reading import (
    AnyRecipe,
    build_recipe,
    checked_call,
    is_recipe_file,
    put,
    read_recipe_file,
)
from secateur.recipes.section import Recipe, Section
from secateur.recipes.yaml_text import read_yaml


def recipe_from_flags(
    kind: type[AnyRecipe], given: Mapping[str, Any], assignments: Sequence[str] = ()
) -> AnyRecipe:
    """The recipe that the words of a command describe.

    The first argument may be a recipe file. Flags replace its values, and assignments replace
    both.

    Args:
        kind: the class of the recipe.
        given: option name → text, list of texts, or bool; None means not given.
        assignments: the values of `--set`.

    Raises:
        RecipeError: listing every fault.
    """
    options = {option.name: option for option in options_of(kind)}
    read = {k: read_flag(options[k], text) for k, text in given.items() if text is not None}
    values: dict[str, Any] = {}
    where = None
    first = str(read.get("model", ""))
    if is_recipe_file(first):
        where = first
        values = read_recipe_file(Path(first))
        del read["model"]
    for name, value in read.items():
        put(values, options[name].path, value, where)
    spelled = {options[name].path: options[name].flag_text for name in read}
    return build_recipe(kind, values, assignments, where, spelled)


def call_from_flags(kind: type[Recipe], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one call; arguments and errors as in `recipe_from_flags`."""
    options = {option.name: option for option in run_options_of(kind)}
    read = {k: read_flag(options[k], text) for k, text in given.items() if text is not None}
    spelled = {options[name].path: options[name].flag_text for name in read}
    return checked_call(kind, read, spelled)


def takes_several(option: Option) -> bool:
    """Whether the flag of an option may be repeated."""
    return get_origin(option.type) in (tuple, list, dict)


def read_flag(option: Option, given: Any) -> Any:
    """Read the text of a flag as a value of the option's type.

    Text that does not fit the type stays text. The recipe then refuses it, together with all other
    faults.

    Raises:
        RecipeError: an entry of a mapping is not KEY=VALUE.
    """
    if isinstance(given, bool):
        return given
    if get_origin(option.type) is dict:
        return dict(read_entry(option, text) for text in given)
    if takes_several(option):
        words = (
            [w.strip() for text in given for w in text.split(",")] if option.flag.commas else given
        )
        return tuple(
            read_text(without_none(get_args(option.type)[0]), word) for word in words if word
        )
    return read_text(option.type, given)


def read_entry(option: Option, text: str) -> tuple[str, Any]:
    """Read KEY=VALUE.

    Raises:
        RecipeError: the text has another form.
    """
    key, equals, value = text.rpartition("=")
    if not equals or not key:
        raise RecipeError(
            f"{option.flag_text} {shlex.quote(text)}: must be {option.flag.value or 'KEY=VALUE'}",
            remedy="put an equals sign between the two, and quotes around both",
        )
    return key, read_yaml(value, text[:200])


def read_text(kind: Any, text: str) -> Any:
    """Convert a text to a type, if possible."""
    try:
        if kind is int or (kind == int | float and "." not in text):
            return int(text)
        if kind is float or kind == int | float:
            return float(text)
    except ValueError:
        return text
    if isinstance(kind, type) and issubclass(kind, Section) and int in kind.alone:
        return read_text(int, text)
    return text
