"""Build a recipe from YAML, the words of a command line or keywords. One error lists all faults.

A fault names a value as the user gave it: a key, a flag or a keyword. pydantic says what is wrong.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from secateur.errors import RecipeError
from secateur.models.hub import own_texts
from secateur.recipes.options import (
    Option,
    Recipe,
    Section,
    all_options,
    holds,
    options_of,
    run_options_of,
    section_of,
    without_none,
)
from secateur.recipes.recipe_files import read_recipe_file, read_yaml
from secateur.recipes.shared import DEFAULT_TEXT

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def build_recipe(kind: type[AnyRecipe], values: Mapping[str, Any]) -> AnyRecipe:
    """Build a recipe from nested values by their YAML keys, and fill in its preset.

    Raises:
        RecipeError: listing every fault, with similar names for unknown keys.
    """
    return build_call(kind, values, {})[0]


def build_call(
    kind: type[AnyRecipe],
    values: Mapping[str, Any],
    call: Mapping[str, Any],
    assignments: Sequence[str] = (),
    where: str | None = None,
    spelled: Spelled = MappingProxyType({}),
) -> tuple[AnyRecipe, dict[str, Any]]:
    """Build a recipe, and check the options of one call, which are no keys of it.

    Args:
        kind: the class of the recipe.
        values: values by their YAML keys.
        call: the options of the call by name.
        assignments: each KEY=VALUE; applied in turn.
        where: the file that the values come from, for errors.
        spelled: how the user named the options that are not from YAML, for errors.

    Raises:
        RecipeError: as `build_recipe`.
    """
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        _set_value(kind, merged, assignment)
    _refuse_other_bytes({**merged, **call}, where)
    # the preset last: it fills what the recipe, the flags and --set leave open
    preset = filled_in(merged, kind.presets) if kind.presets else merged
    whole = _with_own_texts(kind, preset)
    made: list[Section] = []
    faults: list[str] = []
    parts: list[tuple[type[Section], Mapping[str, Any]]] = [(kind, whole)]
    for section, given in [*parts, (kind.run, call)] if kind.run else parts:
        try:
            made.append(section.model_validate(given))
        except ValidationError as error:
            faults += _fault_lines(section, error, spelled)
    if faults:
        raise RecipeError.of(faults, where=where)
    all_given = {**merged, **call}
    idle = [line for section in made for line in idle_lines(section, all_given, spelled)]
    wrong = [*((line, NEEDED) for line in idle), *_conflicts_in(made, all_given, spelled)]
    if len(wrong) == 1:
        raise RecipeError(wrong[0][0], where=where, remedy=wrong[0][1])
    if wrong:
        lines = [what if remedy == NEEDED else f"{what}; {remedy}" for what, remedy in wrong]
        raise RecipeError.of(lines, where=where, remedy=NEEDED if idle else None)
    recipe: Any = made[0]
    return recipe, {name: getattr(made[1], name) for name in call}


def _refuse_other_bytes(values: Mapping[str, Any], where: str | None) -> None:
    """Refuse names that are no UTF-8: no record could hold them."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - SHOWN // 2) : error.end]
        raise RecipeError(
            f"a name is not UTF-8: {near.encode(errors='backslashreplace').decode()}",
            where=where,
            remedy="rename the file or folder",
        ) from None


_COMPOSITION = {"method", "score", "solver", "refine"}
"""Values that only make sense together. If the recipe has one of them, the preset sets none, and no
parameters either. Parameters alone are added to those of the preset."""


def filled_in(values: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Add the values of the preset that a recipe does not have itself.

    Without an effort, method, score or solver, the effort is `balanced`. An unknown effort adds
    nothing; the recipe refuses it. An allocation is left out where the pattern or the scope leave
    it nothing to decide.

    Args:
        values: the values of the recipe.
        known: the presets of this kind of recipe.
    """
    given = {key: value for key, value in values.items() if value is not None}
    composed = _COMPOSITION & given.keys()
    effort = given.get("effort")
    if effort is None:
        if composed & {"method", "score", "solver"}:
            return given
        effort = "balanced"
    preset = known.get(effort, {}) if isinstance(effort, str) else {}
    # an N:M pattern has one sparsity, and one threshold over the model decides by itself
    decided = ":" in str(given.get("pattern", "")) or given.get("scope") == "global"
    for key, value in preset.items():
        if composed and key in _COMPOSITION | {"method_parameters"}:
            continue
        if key == "allocation" and decided:
            continue
        if isinstance(value, Mapping) and isinstance(given.get(key, {}), Mapping):
            given[key] = {**value, **given.get(key, {})}
        else:
            given.setdefault(key, value)
    return {**given, "effort": effort}


AUTO_TEXT = "auto"
"""The text that the model brings, or else the usual one."""


def _with_own_texts(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the texts that a sample brings, where a recipe names none.

    Args:
        kind: the class of the recipe.
        values: the values of the recipe.
    """
    model = values.get("model")
    filled = deepcopy(dict(values))
    for option in (option for option in options_of(kind) if option.flag.own_text):
        given: Any = filled
        for key in option.path:  # a single value may stand for the section
            given = given.get(key) if isinstance(given, Mapping) else given
        if given not in (None, AUTO_TEXT):
            continue
        texts = own_texts(model) if isinstance(model, str) else None
        if given == AUTO_TEXT or (texts and option.default != "none"):
            text = getattr(texts, str(option.flag.own_text)) if texts else DEFAULT_TEXT
            _put(kind, filled, option.path, text)
    return filled


def _set_value(kind: type[Section], values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set section.key=value`; the value is read as YAML."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"--set {assignment!r} is not KEY=VALUE",
            remedy="name a key with its sections, such as --set calibration.windows=64",
        )
    where = f"--set {assignment}"[:200]
    _put(kind, values, path.split("."), read_yaml(text, where), where)


def _section_named(kind: type[Section] | None, name: str) -> type[Section] | None:
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
    paths = {name: known[name].path if name in known else (name,) for name in options}
    # whole sections before the options in them, which replace single values
    for name, path in sorted(paths.items(), key=lambda item: len(item[1])):
        value = options[name]
        if isinstance(value, Mapping) and _section_named(kind, name):
            for key, inner in value.items():
                _put(kind, values, (name, str(key)), inner)
        else:
            _put(kind, values, path, value)
    return values


def _put(
    kind: type[Section],
    values: dict[str, Any],
    path: Sequence[str],
    value: Any,
    where: str | None = None,
) -> None:
    """Put a value at its path. A single value that stands for a section on the way is opened."""
    *sections, key = path
    inner: type[Section] | None = kind
    for name in sections:
        inner = _section_named(inner, name)
        values[name] = values.get(name, {}) if inner is None else inner.opened(values.get(name, {}))
        values = values[name]
        if not isinstance(values, dict):
            raise RecipeError(
                f"{name} is {str(values)[:40]!r}, not keys and values",
                where=where,
                remedy=f"write for example '{name}: {{{key}: …}}'",
            )
    values[key] = value


def recipe_from_flags(
    kind: type[AnyRecipe], given: Mapping[str, Any], assignments: Sequence[str] = ()
) -> tuple[AnyRecipe, dict[str, Any]]:
    """The recipe and the options of the call that the words of a command describe.

    The first argument may be a recipe file. Flags replace its values, and assignments replace
    both.

    Args:
        kind: the class of the recipe.
        given: option name → text, list of texts, or bool; None means not given.
        assignments: the values of `--set`.

    Raises:
        RecipeError: listing every fault.
    """
    known = {option.name: option for option in all_options(kind)}
    of_call = {option.name for option in run_options_of(kind)}
    read = {n: read_flag(known[n], text) for n, text in given.items() if text is not None}
    values: dict[str, Any] = {}
    where, first = None, str(read.get("model"))
    if first.endswith((".yaml", ".yml")):
        where = first
        values = read_recipe_file(Path(first))
        del read["model"]
    spelled = {known[name].path: known[name].flag_text for name in read}
    call = {name: read.pop(name) for name in of_call & read.keys()}
    for name, value in sorted(read.items(), key=lambda item: len(known[item[0]].path)):
        _put(kind, values, known[name].path, value, where)
    return build_call(kind, values, call, assignments, where, spelled)


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
        return dict(_read_entry(option, text) for text in given)
    if takes_several(option):
        words = (
            [w.strip() for text in given for w in text.split(",")] if option.flag.commas else given
        )
        return tuple(
            _read_text(without_none(get_args(option.type)[0]), word) for word in words if word
        )
    return _read_text(option.type, given)


def _read_entry(option: Option, text: str) -> tuple[str, Any]:
    """Read KEY=VALUE."""
    key, equals, value = text.rpartition("=")
    if not equals or not key:
        raise RecipeError(
            f"{option.flag_text} {shlex.quote(text)}: must be {option.flag.value or 'KEY=VALUE'}",
            remedy="put an equals sign between the two, and quotes around both",
        )
    return key, read_yaml(value, text[:200])


NUMBERS: Mapping[Any, tuple[Callable[[str], float], ...]] = {
    int: (int,), float: (float,), int | float: (int, float), int | float | str: (int, float),
}  # fmt: skip
"""How a text becomes a number of a type."""


def _read_text(kind: Any, text: str) -> Any:
    """Convert a text to a type, if possible."""
    for read in NUMBERS.get(kind, ()):
        with suppress(ValueError):
            return read(text)
    if isinstance(kind, type) and issubclass(kind, Section) and int in kind.alone:
        return _read_text(int, text)
    return text


Spelled = Mapping[tuple[str, ...], str]
"""How the user named an option, by its path: `--windows`, `MODEL`, or `windows` in Python. Values
that are not in it come from YAML, and have the names of their keys."""

SHOWN = 100
"""Characters of a value that an error shows."""


def _fault_lines(kind: type[Section], error: ValidationError, spelled: Spelled) -> list[str]:
    """A line for each wrong value: its name as the user wrote it, and what pydantic says."""
    found: dict[str, dict[str, None]] = {}
    for fault in error.errors():
        name, what = _described(kind, fault, spelled)
        found.setdefault(name, {})[what] = None
    return [f"{name}: {'; or '.join(parts)}" for name, parts in found.items()]


NEEDED = "leave out what changes nothing, or give what it needs"
"""The remedy for options that change nothing."""


def idle_lines(section: Section, given: Mapping[str, Any], spelled: Spelled) -> list[str]:
    """A line for each option that was given and changes nothing, as another one is missing.

    A line of a recipe with the default counts as not given, because a recipe that was written lists
    all. A flag or a keyword counts, unless it only says that a switch stays off. Who switches the
    other one off knows what is left without effect: a keyword or a flag may switch off what a
    recipe has, and a line of a recipe what another line has.

    Args:
        section: the recipe, its preset filled in, or the options of a call.
        given: the nested values from which it was made, without the preset's.
        spelled: the names of options that do not come from YAML.
    """
    options = {option.name: option for option in options_of(type(section))}
    presets = getattr(section, "presets", {})
    preset = presets.get(getattr(section, "effort", None) or "", {})
    usual, lines = type(section).model_construct(**preset), []
    for name, others in section.needs.items():
        path, needed = options[name].path, [options[other] for other in others]
        value = _value_at(section, path)
        usually = value == _value_at(usual, path) and (path not in spelled or value is False)
        if not holds(given, path) or value is None or usually:
            continue
        if any(holds(given, x.path) and (x.path in spelled or path not in spelled) for x in needed):
            continue
        if not any(_value_at(section, option.path) for option in needed):
            names = [_name_of(option, options[name], spelled) for option in needed]
            wanted = f"one of {', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
            lines.append(
                f"{spelled.get(path, options[name].key)}: changes nothing without {wanted}"
            )
    return lines


def _conflicts_in(
    made: Sequence[Section], given: Mapping[str, Any], spelled: Spelled
) -> Iterator[tuple[str, str]]:
    """What does not go together, and the remedy.

    An option counts if its value is not the default, or if it is a number above 0 that was given.
    """
    states = {
        option.name: (option, _value_at(section, option.path), _value_at(usual, option.path))
        for section in made
        for usual in [type(section).model_construct()]
        for option in options_of(type(section))
    }

    def counting(words: str) -> tuple[Option, str] | None:
        """The first of these options that counts, and the value that is asked for."""
        for word in words.split(" or "):
            name, equals, wanted = word.partition("=")
            option, value, usual = states[name]
            named = option.path in spelled and holds(given, option.path)
            amount = named and type(value) in (int, float) and value > 0
            if str(value) == wanted if equals else value != usual or amount:
                return option, wanted
        return None

    for row in (row for section in made for row in section.conflicts):
        if row.unless and counting(row.unless):
            continue
        if not row.option:
            yield row.reason, row.remedy
        elif (one := counting(row.option)) and (two := counting(row.other)):
            names = _name_of(one[0], two[0], spelled), _name_of(two[0], one[0], spelled)
            missing = two[1] in ("None", "False")
            value = "" if missing else two[1]
            pair = (" without " if missing else " with ").join(names)
            yield f"{pair}{value and ' '}{value}: {row.reason}", row.remedy


def _name_of(option: Option, other: Option, spelled: Spelled) -> str:
    """An option as the user named it, else in the form in which the other one was named."""
    like = spelled.get(option.path) or spelled.get(other.path, "")
    form = option.flag_text if like.startswith("-") or like.isupper() else option.name
    return spelled.get(option.path, form if like else option.key)


def _value_at(section: Any, path: Sequence[str]) -> Any:
    """The value of an option in a recipe; a section of a preset may be a mapping."""
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else getattr(section, key, None)
    return section


def _described(kind: type[Section], fault: Mapping[str, Any], spelled: Spelled) -> tuple[str, str]:
    """The value as the user wrote it, and what is wrong with it."""
    path, rest = _located(kind, fault["loc"])
    name = next((spelled[path[:n]] for n in range(len(path), 0, -1) if path[:n] in spelled), None)
    key, given, what = ".".join([*path, *rest]), fault["input"], fault["msg"]
    what = what.removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return key, _unknown_key(kind, key)
    if fault["type"] == "missing":
        return name or key, f"{what}: {next(o.help for o in options_of(kind) if o.path == path)}"
    if isinstance(given, Mapping) and fault["type"] == "value_error":
        return key or "recipe", what  # options that contradict each other
    if name is None or (name.isidentifier() and name.islower()):
        return f"{'.'.join([name, *rest]) if name else key}={repr(given)[:SHOWN]}", what
    given = f"{given:g}" if isinstance(given, float) else given  # 2, where a flag says 2
    entry = "".join(f"{part}=" for part in rest if not part.isdecimal())
    return f"{name} {shlex.quote(f'{entry}{given}'[:SHOWN])}", what


def _located(
    kind: type[BaseModel], place: Sequence[str | int]
) -> tuple[tuple[str, ...], list[str]]:
    """The keys that lead to a fault, and the entries below the last key.

    pydantic adds the name of a type where a value may have several; it is left out.
    """
    section: type[BaseModel] | None = kind
    path, rest = list[str](), list[str]()
    for part in map(str, place):
        if section is not None and part in section.model_fields and not rest:
            path.append(part)
            section = section_of(section.model_fields[part])
        elif part not in ("bool", "int", "float", "str") and "[" not in part:
            rest.append(part)
    return tuple(path), rest


def _unknown_key(kind: type[Section], key: str) -> str:
    """What may be meant by a key that there is not."""
    *sections, name = key.split(".")
    inner: type[Section] | None = kind
    for part in sections:
        inner = _section_named(inner, part)
    meant = {}
    if not sections:
        meant = {x: o.key for o in options_of(kind) for x in (o.name, *o.flag.aliases)}
    if name in meant:
        return f"unknown key; in a recipe this is {meant[name]!r}"
    known = [*(inner.model_fields if inner else ()), *meant]
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown key; did you mean {near[0]!r}?" if near else "unknown key"
