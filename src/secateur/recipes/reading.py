"""Build a recipe from YAML, the words of a command line or keywords. One error lists all faults.

A fault names a value as the user gave it: a key, a flag or a keyword.

PyYAML reads YAML 1.1, in which `2:4` is the number 124 and `1e-3` is text. Here numbers are read as
in YAML 1.2. Refused are a key that is given twice (YAML would keep the last one), keys that are not
text, aliases (a few lines of them can mean gigabytes), and documents that are too deep.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from secateur.errors import RecipeError
from secateur.models.hub import own_texts
from secateur.recipes.options import (
    Option,
    Recipe,
    Section,
    all_options,
    choices_of,
    holds,
    options_of,
    run_options_of,
    section_of,
    without_none,
)
from secateur.recipes.shared import DEFAULT_TEXT

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_recipe_file(file: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        RecipeError: the file does not exist, or is not a mapping.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(LONGEST_RECIPE)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe cannot be read: {error}",
            where=str(file),
            remedy="check the path; a recipe is UTF-8 text",
        ) from None
    if len(text) == LONGEST_RECIPE:
        raise RecipeError(
            "the file is too large for a recipe", where=str(file), remedy="check the path"
        )
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
    return build_call(kind, values, {}, assignments, where, spelled)[0]


def build_call(
    kind: type[AnyRecipe],
    values: Mapping[str, Any],
    call: Mapping[str, Any],
    assignments: Sequence[str] = (),
    where: str | None = None,
    spelled: Spelled = MappingProxyType({}),
) -> tuple[AnyRecipe, dict[str, Any]]:
    """Build a recipe, and check the options of one call, which are no keys of it.

    Args, errors: as in `build_recipe`; `call` has the options of the call by name.
    """
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for assignment in assignments:
        _set_value(kind, merged, assignment)
    _refuse_other_bytes({**merged, **call}, where)
    preset = filled_in(merged, kind.presets) if kind.presets else merged
    whole = with_own_texts(kind, preset)
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
    _refuse_contradictions(made, {**merged, **call}, where, spelled)
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

    Without an effort, method, score, solver or learned masks, the effort is `balanced`. An unknown
    effort adds nothing; the recipe refuses it. An allocation is left out where the pattern or the
    scope leave it nothing to decide.

    Args:
        values: the values of the recipe.
        known: the presets of this kind of recipe.
    """
    given = {key: value for key, value in values.items() if value is not None}
    composed = _COMPOSITION & given.keys()
    effort = given.get("effort")
    if effort is None:
        if composed & {"method", "score", "solver"} or "learned" in given:
            return given
        effort = "balanced"
    preset = known.get(effort, {}) if isinstance(effort, str) else {}
    for key, value in preset.items():
        if composed and key in _COMPOSITION | {"method_parameters"}:
            continue
        if key == "allocation" and not _allocates(given):
            continue
        if isinstance(value, Mapping) and isinstance(given.get(key, {}), Mapping):
            given[key] = {**value, **given.get(key, {})}
        else:
            given.setdefault(key, value)
    return {**given, "effort": effort}


AUTO_TEXT = "auto"
"""The text that the model brings, or else the usual one."""


def with_own_texts(kind: type[Section], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the texts that a sample brings, where a recipe names none.

    Args:
        kind: the class of the recipe.
        values: the values of the recipe.
    """
    model = values.get("model")
    texts = own_texts(model) if isinstance(model, str) else None
    for option in (option for option in options_of(kind) if option.flag.own_text):
        given = functools.reduce(_entry_of, option.path, values)
        if given == AUTO_TEXT or (given is None and texts and option.default != "none"):
            text = getattr(texts, str(option.flag.own_text)) if texts else DEFAULT_TEXT
            values = _with_value(values, option.path, text)
    return values


def _entry_of(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else values


def _with_value(values: Mapping[str, Any], path: Sequence[str], value: Any) -> Mapping[str, Any]:
    """The same values with another one at a path."""
    key, *rest = path
    return {**values, key: _with_value(values.get(key) or {}, rest, value) if rest else value}


def _allocates(values: Mapping[str, Any]) -> bool:
    """Whether a recipe leaves open how much sparsity each linear layer gets.

    An N:M pattern has one sparsity, and one threshold over the model decides by itself.
    """
    return ":" not in str(values.get("pattern", "")) and values.get("scope") != "global"


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


def dump_recipe(recipe: BaseModel) -> str:
    """Write the recipe as YAML, with every default."""
    return write_yaml(recipe.model_dump(mode="json"))


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
    int: (int,), float: (float,), int | float: (int, float),
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


def _refuse_contradictions(
    made: Sequence[Section], given: Mapping[str, Any], where: str | None, spelled: Spelled
) -> None:
    """Refuse options that change nothing, and options that do not go together; list all."""
    idle = [line for section in made for line in idle_lines(section, given, spelled)]
    faults = [(line, NEEDED) for line in idle] + list(_conflicts_in(made, given, spelled))
    if not faults:
        return
    [(what, remedy), *more] = faults
    if not more:
        raise RecipeError(what, where=where, remedy=remedy)
    lines = [what if remedy == NEEDED else f"{what}; {remedy}" for what, remedy in faults]
    raise RecipeError.of(lines, where=where, remedy=NEEDED if idle else None)


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
            value = two[1] if two[1] != "None" else ""
            pair = (" without " if two[1] == "None" else " with ").join(names)
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
    path, rest, choices = _located(kind, fault["loc"])
    name = next((spelled[path[:n]] for n in range(len(path), 0, -1) if path[:n] in spelled), None)
    keys, given = ".".join([*path, *rest]), fault["input"]
    what = re.sub(r" or instance of \w+|^Value error, ", "", fault["msg"])
    what = what.replace("Input should be", "must be").replace("valid tuple", "valid list")
    if fault["type"] == "extra_forbidden":
        return keys, _unknown_key(kind, path, str(fault["loc"][-1]))
    if fault["type"] == "missing":
        help_text = next((o.help for o in options_of(kind) if o.path == path), "")
        return name or keys, f"missing. {help_text}".rstrip()
    if isinstance(given, Mapping) and fault["type"] == "value_error":
        return keys or "recipe", what  # options that contradict each other
    if near := difflib.get_close_matches(str(given), choices, n=1):
        what += f"; did you mean {near[0]}?"
    if name is None or (name.isidentifier() and name.islower()):
        return f"{'.'.join([name, *rest]) if name else keys}={repr(given)[:SHOWN]}", what
    given = f"{given:g}" if isinstance(given, float) else given
    entry = "".join(f"{key}=" for key in rest if not key.isdecimal())
    return f"{name} {shlex.quote(f'{entry}{given}'[:SHOWN])}", what


def _located(
    kind: type[BaseModel], place: Sequence[str | int]
) -> tuple[tuple[str, ...], list[str], tuple[str, ...]]:
    """The keys that lead to a fault, the entries below the last key, and the choices there.

    pydantic adds the name of a type where a value may have several; it is left out.
    """
    section: type[BaseModel] | None = kind
    path, rest, choices = list[str](), list[str](), tuple[str, ...]()
    for part in map(str, place):
        field = section.model_fields.get(part) if section and not rest else None
        if field is not None:
            path.append(part)
            section, choices = section_of(field), choices_of(without_none(field.annotation))
        elif part not in ("bool", "int", "float", "str") and "[" not in part:
            rest.append(part)
    return tuple(path), rest, choices


def _unknown_key(kind: type[Section], path: tuple[str, ...], name: str) -> str:
    """What may be meant by a key that there is not."""
    section: type[Section] = kind
    for part in path:
        section = section_of(section.model_fields[part]) or section
    if section is not kind:
        return unknown_name("key", name, list(section.model_fields))
    options = options_of(kind)
    home = next((option.key for option in options if option.name == name), None)
    meant = next((option.name for option in options if name in option.flag.aliases), None)
    if meant is not None:
        return f"unknown key; did you mean {meant!r}?"
    if home is not None:
        return f"unknown key; in a recipe this is {home!r}"
    known = dict.fromkeys([*kind.model_fields, *(option.name for option in options)])
    return unknown_name("key", name, list(known))


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The hint of an error about an unknown key, option or verb: a similar name, or a few names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near and len(known) > MOST_NAMES:
        return f"unknown {what}; `secateur VERB --help` lists all"
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what}; {hint}"


MOST_NAMES = 12
"""Names that an error lists."""


LONGEST_RECIPE = 2**20
"""Characters of a file that is no recipe."""

INT = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
FIRST_OF_NUMBERS = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """Reads plain data, with YAML 1.2 numbers and without aliases."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML declares it
        first: [(tag, text) for tag, text in known if tag not in (INT_TAG, FLOAT_TAG)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse an alias; else the usual node."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice or is not text."""
        seen = set[str]()
        for key, _ in node.value:
            text = isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str"
            if not text or key.value in seen:
                what = f"the key {key.value!r} is given twice" if text else "a key is not text"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number. Unlike in YAML 1.1, a leading zero changes nothing."""
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class Dumper(yaml.SafeDumper):
    """Writes YAML that 1.1 and 1.2 read alike: text that is a number in either is quoted."""


Loader.add_constructor(INT_TAG, Loader.construct_yaml_int)
for kind in (Loader, Dumper):
    for tag, pattern in ((FLOAT_TAG, FLOAT), (INT_TAG, INT)):
        whole = re.compile(rf"(?:{pattern.pattern})$")
        kind.add_implicit_resolver(tag, whole, FIRST_OF_NUMBERS)


def read_yaml(text: str, where: str | None = None) -> Any:
    """Read a YAML document.

    Args:
        text: the document.
        where: the file or option that it comes from, for errors.

    Raises:
        RecipeError: it is not YAML, has a key twice, or is too deep for a recipe.
    """
    try:
        return yaml.load(text, Loader)
    except (  # PyYAML raises other errors than its own if a value does not fit its tag
        yaml.YAMLError,
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RecipeError(
            f"the recipe is not YAML: {str(error)[:500]}",
            where=where,
            remedy="mend it there; a recipe is lines of 'key: value'",
        ) from None


def write_yaml(value: Any) -> str:
    """Write plain data as YAML, with keys in their order."""
    # on one line each: a path that is broken at a space is no path any more
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
