"""Say what is wrong with a value of a recipe, by the name under which the user gave it."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from secateur.recipes.options import choices_of, holds, options_of, section_of, without_none
from secateur.recipes.section import Recipe, Section

Spelled = Mapping[tuple[str, ...], str]
"""How the user named an option, by its path: `--windows`, `MODEL`, or `windows` in Python. Values
that are not in it come from YAML, and have the names of their keys."""

KINDS = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "keys and values",
    "model_type": "keys and values",
    "string_type": "text",
    "tuple_type": "a list",
}
"""What a value must be, by pydantic's name of the fault."""

ALONE = {int: "a whole number", float: "a number", str: "text"}
"""Single values that may stand for a section."""

SHOWN = 100
"""Characters of a value that an error shows."""


def fault_lines(kind: type[Section], error: ValidationError, spelled: Spelled) -> list[str]:
    """A line for each wrong value, with what it must be.

    Args:
        kind: the class of the recipe.
        error: what pydantic found.
        spelled: the names of options that do not come from YAML.
    """
    found: dict[str, list[str]] = {}
    for fault in error.errors():
        name, what = described(kind, fault, spelled)
        found.setdefault(name, []).append(what)
    return [f"{name}: {joined(parts)}" if name else joined(parts) for name, parts in found.items()]


def idle_lines(recipe: Recipe, given: Mapping[str, Any], spelled: Spelled) -> list[str]:
    """A line for each option that was given and changes nothing, as another one is missing.

    An option with its default counts as not given, because a recipe that was written lists all.
    Who switches the other one off knows what is left without effect: a keyword or a flag may switch
    off what a recipe has, and a line of a recipe what another line has.

    Args:
        recipe: the recipe, its preset filled in.
        given: the nested values from which it was made, without the preset's.
        spelled: the names of options that do not come from YAML.
    """
    options = {option.name: option for option in options_of(type(recipe))}
    preset = recipe.presets.get(getattr(recipe, "effort", None) or "", {})
    usual, lines = type(recipe).model_construct(**preset), []
    for name, others in recipe.needs.items():
        path, needed = options[name].path, [options[other] for other in others]
        if not holds(given, path) or value_at(recipe, path) in (None, value_at(usual, path)):
            continue
        if any(holds(given, x.path) and (x.path in spelled or path not in spelled) for x in needed):
            continue
        if not any(value_at(recipe, option.path) for option in needed):
            told = spelled.get(path)
            names = [x.flag_text if told and told[0] == "-" else x.name if told else x.key
                     for x in needed]  # fmt: skip
            wanted = f"one of {', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
            lines.append(f"{told or options[name].key}: changes nothing without {wanted}")
    return lines


def value_at(section: Any, path: Sequence[str]) -> Any:
    """The value of an option in a recipe; a section of a preset may be a mapping."""
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else getattr(section, key)
    return section


def described(kind: type[Section], fault: Mapping[str, Any], spelled: Spelled) -> tuple[str, str]:
    """The value as the user wrote it, and what is wrong with it."""
    path, rest, field_type = located(kind, fault["loc"])
    name = next((spelled[path[:n]] for n in range(len(path), 0, -1) if path[:n] in spelled), None)
    keys = ".".join([*path, *rest])
    what, given = wrong(fault, field_type), fault["input"]
    if fault["type"] == "extra_forbidden":
        return keys, unknown_key(kind, path, str(fault["loc"][-1]))
    if fault["type"] == "missing":
        help_text = next((o.help for o in options_of(kind) if o.path == path), "")
        return name or keys, f"missing. {help_text}".rstrip()
    if isinstance(given, Mapping) and fault["type"] == "value_error":
        return keys, what  # options that contradict each other
    if name is None or (name.isidentifier() and name.islower()):
        return f"{'.'.join([name, *rest]) if name else keys}={repr(given)[:SHOWN]}", what
    given = f"{given:g}" if isinstance(given, float) else given
    entry = "".join(f"{key}=" for key in rest if not key.isdecimal())
    return f"{name} {shlex.quote(f'{entry}{given}'[:SHOWN])}", what


def located(
    kind: type[BaseModel], place: Sequence[str | int]
) -> tuple[tuple[str, ...], list[str], Any]:
    """The keys that lead to a fault, the entries below the last key, and the type of its field.

    pydantic adds the name of a type where a value may have several; it is left out.
    """
    section: type[BaseModel] | None = kind
    path: list[str] = []
    rest: list[str] = []
    found: Any = None
    for part in map(str, place):
        field = section.model_fields.get(part) if section and not rest else None
        if field is not None:
            path.append(part)
            section, found = section_of(field), without_none(field.annotation)
        elif part not in ("bool", "int", "float", "str") and "[" not in part:
            rest.append(part)
    return tuple(path), rest, found


def wrong(fault: Mapping[str, Any], field_type: Any) -> str:
    """What a value must be."""
    kind, limits = fault["type"], fault.get("ctx", {})
    must = KINDS.get(kind)
    if kind == "model_type" and getattr(field_type, "alone", ()):
        must = " or ".join(ALONE[single] for single in field_type.alone)
    elif kind == "greater_than":
        least = limits["gt"]
        must = f"{least + 1} or more" if field_type is int else f"more than {number(least)}"
    elif kind == "greater_than_equal":
        must = f"{number(limits['ge'])} or more"
    elif kind == "less_than":
        must = f"less than {number(limits['lt'])}"
    elif kind == "less_than_equal":
        must = f"{number(limits['le'])} or less"
    elif kind == "literal_error":
        must = str(limits["expected"]).replace("'", "")
        near = difflib.get_close_matches(str(fault["input"]), choices_of(field_type), n=1)
        must += f"; did you mean {near[0]}?" if near else ""
    elif kind == "too_short":
        must = f"at least {limits['min_length']}"
    return f"must be {must}" if must else str(fault["msg"]).removeprefix("Value error, ")


def joined(parts: Sequence[str]) -> str:
    """One sentence for a value that may have several types and has none of them."""
    whole, any_number = "must be a whole number", "must be a number"
    parts = [x for x in dict.fromkeys(parts) if x != whole or any_number not in parts]
    return " or ".join([parts[0], *(x.removeprefix("must be ") for x in parts[1:])])


def number(value: float) -> str:
    """A limit as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def unknown_key(kind: type[Section], path: tuple[str, ...], name: str) -> str:
    """What may be meant by a key that there is not."""
    section: type[Section] = kind
    for part in path:
        section = section_of(section.model_fields[part]) or section
    if section is not kind:
        return unknown_name("key", name, list(section.model_fields))
    options = options_of(kind)
    home = next((option.key for option in options if option.name == name), None)
    if home is not None:
        return f"unknown key; in a recipe this is {home!r}"
    known = dict.fromkeys([*kind.model_fields, *(option.name for option in options)])
    return unknown_name("key", name, list(known))


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The hint of an error about an unknown key, option or verb: a similar name, or all names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what}; {hint}"
