"""Build a recipe from a YAML file and command-line options. One error lists all faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from secateur.errors import RecipeError
from secateur.recipes.faults import Spelled, fault_lines, idle_lines
from secateur.recipes.options import example_of, options_of, section_of
from secateur.recipes.presets import filled_in
from secateur.recipes.section import Recipe, Section
from secateur.recipes.yaml_text import read_yaml, write_yaml

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
AnySection = TypeVar("AnySection", bound=Section)


def is_recipe_file(text: str) -> bool:
    """Whether the first argument of a command is a recipe file and not a model."""
    return text.endswith((".yaml", ".yml"))


def read_recipe_file(file: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        RecipeError: the file does not exist, or is not a mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}",
            where=str(file),
            remedy="check the path, and whether you may read the file",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the recipe is not UTF-8 text: {error}",
            where=str(file),
            remedy="save it as UTF-8",
        ) from None
    content = read_yaml(text, str(file))
    if not isinstance(content, dict):
        raise RecipeError(
            "a recipe is a mapping of keys to values",
            where=str(file),
            remedy="write for example 'model: smollm2-135m'",
        )
    return content


def build_recipe(
    kind: type[AnyRecipe],
    values: Mapping[str, Any],
    assignments: Sequence[str] = (),
    where: str | None = None,
    spelled: Spelled = MappingProxyType({}),
) -> AnyRecipe:
    """Build a recipe from nested values and `--set` assignments, and fill in its preset.

    Args:
        kind: the class of the recipe.
        values: values by their YAML keys.
        assignments: each KEY=VALUE; applied in turn.
        where: the file that the values come from, for errors.
        spelled: how the user named the options that are not from YAML, for errors.

    Raises:
        RecipeError: listing every fault, with similar names for unknown keys.
    """
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        set_value(kind, merged, assignment)
    whole = filled_in(merged, kind.presets) if kind.presets else merged
    recipe = validated(kind, whole, where, spelled)
    if idle := idle_lines(recipe, merged, spelled):
        remedy = "leave out what changes nothing, or give what it needs"
        raise RecipeError.of(idle, where=where, remedy=remedy)
    return recipe


def checked_call(
    kind: type[Recipe], given: Mapping[str, Any], spelled: Spelled = MappingProxyType({})
) -> dict[str, Any]:
    """Check the options of one call, which are no keys of the recipe.

    Args:
        kind: the class of the recipe.
        given: values by name.
        spelled: how the user named them, for errors.

    Returns:
        The same values.

    Raises:
        RecipeError: listing every fault.
    """
    if kind.run is None:
        return {}
    checked = validated(kind.run, given, None, spelled)
    return {name: getattr(checked, name) for name in given}


def validated(
    kind: type[AnySection], values: Mapping[str, Any], where: str | None, spelled: Spelled
) -> AnySection:
    """Build a section from nested values; see `build_recipe`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError.of(fault_lines(kind, error, spelled), where=where) from None


def set_value(kind: type[Section], values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set section.key=value`; the value is read as YAML.

    Raises:
        RecipeError: the text is not an assignment.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"--set {assignment!r} is not KEY=VALUE",
            remedy=f"for example --set {example_of(kind)}" if issubclass(kind, Recipe) else None,
        )
    *sections, key = path.split(".")
    inner: type[Section] | None = kind
    for name in sections:
        inner = section_named(inner, name)
        values[name] = values.get(name, {}) if inner is None else inner.opened(values.get(name, {}))
        values = values[name]
        if not isinstance(values, dict):
            raise RecipeError(f"--set {assignment!r}: {name!r} holds a value, not keys")
    values[key] = read_yaml(text, f"--set {assignment}"[:200])


def section_named(kind: type[Section] | None, name: str) -> type[Section] | None:
    """The section class of this name, or None."""
    field = None if kind is None else kind.model_fields.get(name)
    return None if field is None else section_of(field)


def nested(kind: type[Section], options: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the flat options of a Python call into the sections of a recipe.

    A whole section may be passed as a mapping. Names that the recipe does not have stay at the top
    level, so that `build_recipe` refuses them.

    Args:
        kind: the class of the recipe.
        options: values by the names of `options_of`.
    """
    known = {option.name: option for option in options_of(kind)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and section_named(kind, name):
            for key, inner in value.items():
                put(values, (name, str(key)), inner)
        else:
            put(values, known[name].path if name in known else (name,), value)
    return values


def put(values: dict[str, Any], path: Sequence[str], value: Any, where: str | None = None) -> None:
    """Put a value at its path.

    Raises:
        RecipeError: a value is where a section should be.
    """
    *sections, key = path
    for name in sections:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise RecipeError(
                f"{name} is {str(values)[:40]!r}, not keys and values",
                where=where,
                remedy=f"write for example '{name}: {{{key}: …}}'",
            )
    values[key] = value


def dump_recipe(recipe: BaseModel) -> str:
    """Write the recipe as YAML, with every default."""
    return write_yaml(recipe.model_dump(mode="json"))
