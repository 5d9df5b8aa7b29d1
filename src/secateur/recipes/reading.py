"""From a YAML file and command-line options to a recipe; all faults are listed at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from secateur.errors import RecipeError
from secateur.recipes.presets import filled_in, structure_presets
from secateur.recipes.schema import Calibration, Distill, Memory, PruneRecipe, Reconstruct
from secateur.recipes.structure_schema import Depth, StructureRecipe
from secateur.recipes.yaml_text import read_yaml, write_yaml

__all__ = [
    "SECTIONS",
    "assigned",
    "build_recipe",
    "build_structure_recipe",
    "dump_recipe",
    "is_recipe_file",
    "nested",
    "read_recipe_file",
    "validated",
]

AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)

SECTIONS: Mapping[str, frozenset[str]] = {
    "calibration": frozenset(Calibration.model_fields) - {"source"},
    "memory": frozenset(Memory.model_fields),
    "reconstruction": frozenset(Reconstruct.model_fields),
    "distillation": frozenset(Distill.model_fields),
    "depth": frozenset(Depth.model_fields),
}
"""The sections of a recipe, and the options that belong to them."""


def is_recipe_file(text: str) -> bool:
    """Whether a command's first argument names a recipe rather than a model."""
    return text.endswith((".yaml", ".yml"))


def read_recipe_file(file: Path) -> dict[str, Any]:
    """The mapping written in a YAML file.

    Raises:
        RecipeError: there is no such file, or it is not a mapping.
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


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set section.key=value`; the value is read as YAML.

    Raises:
        RecipeError: it is not an assignment.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"--set {assignment!r} is not KEY=VALUE", remedy="for example --set memory.budget_gib=6"
        )
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {assignment!r}: {section!r} holds a value, not keys")
    values[key] = read_yaml(text, f"--set {assignment}"[:200])


def build_recipe(
    values: Mapping[str, Any], assignments: tuple[str, ...] = (), where: str | None = None
) -> PruneRecipe:
    """Make a recipe of nested values and `--set` assignments, its preset filled in.

    Raises:
        RecipeError: listing every fault, with near names for unknown keys.
    """
    return validated(PruneRecipe, filled_in(assigned(values, assignments)), where)


def build_structure_recipe(
    values: Mapping[str, Any], assignments: tuple[str, ...] = (), where: str | None = None
) -> StructureRecipe:
    """The same for a structured cut.

    Raises:
        RecipeError: listing every fault, with near names for unknown keys.
    """
    filled = filled_in(assigned(values, assignments), structure_presets)
    return validated(StructureRecipe, filled, where)


def assigned(values: Mapping[str, Any], assignments: tuple[str, ...]) -> dict[str, Any]:
    """Nested values with `--set` assignments applied."""
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        set_value(merged, assignment)
    return merged


def validated(kind: type[AnyRecipe], values: Mapping[str, Any], where: str | None) -> AnyRecipe:
    """A recipe of a kind.

    Raises:
        RecipeError: listing every fault.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [fault_text(kind, fault) for fault in error.errors()]
        raise RecipeError(
            f"{len(faults)} fault{'s' * (len(faults) > 1)} in the recipe:\n    "
            + "\n    ".join(faults),
            where=where,
            remedy="mend these keys; the verb's --help says what they take",
        ) from None


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sort flat options, as Python and the command line take them, into a recipe's sections."""
    values: dict[str, Any] = {}
    for key, value in options.items():
        home = next((name for name, keys in SECTIONS.items() if key in keys), None)
        if home:
            values.setdefault(home, {})[key] = value
        elif key == "calibration" and isinstance(value, str):
            values.setdefault("calibration", {})["source"] = value
        else:
            values[key] = value
    return values


def fault_text(kind: type[BaseModel], fault: Any) -> str:
    """One fault, told in a line."""
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = known_keys(kind, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {fault['msg']} (got {repr(fault['input'])[:100]})"


def known_keys(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys a section of a recipe has."""
    model = kind
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def dump_recipe(recipe: BaseModel) -> str:
    """The recipe as YAML, every default written out."""
    return write_yaml(recipe.model_dump(mode="json"))
