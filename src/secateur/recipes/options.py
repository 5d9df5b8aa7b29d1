"""The options of a recipe as a flat list. Flags, keywords, the stub and the docs come from it."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from secateur.recipes.section import ADVANCED, GROUPS, Flag, Recipe, Section

BUDGET = "memory.max_memory"
RISKY = ("trust_remote_code", "public", "machine")
"""Switches that are no good examples."""

PATHS = ("DIR", "FILE", "MODEL", "RECIPE", "TEXT")
"""Words for values that may be given as a path."""
WORDS = {int: "N", float: "X", int | float: "X"}
"""Words for values without a word of their own, by type."""


@dataclass(frozen=True)
class Option:
    """One option of a verb.

    Attributes:
        name: the keyword in Python; with dashes, the flag.
        path: the keys in YAML, from the outermost.
        type: the type of the value, without None.
        required: whether there is no default.
        default: the default in words.
        group: the heading in `--help`.
        help: one or two sentences.
        flag: its name and how the help shows it.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    required: bool
    default: str
    group: str
    help: str
    flag: Flag

    @property
    def key(self) -> str:
        """The key in YAML, with dots."""
        return ".".join(self.path)

    @property
    def choices(self) -> tuple[str, ...]:
        """All values that it or its items may have; empty if there are others."""
        return choices_of(self.type)

    @property
    def is_word(self) -> bool:
        """Whether it is a positional argument rather than a flag."""
        return self.required or self.flag.positional

    @property
    def flag_text(self) -> str:
        """How the command line writes it: `--tune-passes`, or `MODEL` for an argument."""
        return self.name.upper() if self.is_word else "--" + self.name.replace("_", "-")

    @property
    def is_path(self) -> bool:
        """Whether Python may pass a path."""
        return self.flag.value in PATHS

    @property
    def word(self) -> str:
        """What stands for its value in the help."""
        return self.flag.value or WORDS.get(self.type, "NAME")

    @property
    def about(self) -> str:
        """The help, followed by the default."""
        return f"{self.help} [{'required' if self.required else self.default}]"


@functools.cache
def options_of(kind: type[Section]) -> tuple[Option, ...]:
    """All options of a recipe, by group and in the order of their declaration.

    Args:
        kind: the class of the recipe.
    """
    presets = kind.presets if issubclass(kind, Recipe) else {}
    found = list(flattened(kind, (), presets))
    return tuple(sorted(found, key=lambda option: GROUPS.index(option.group)))


def run_options_of(kind: type[Section]) -> tuple[Option, ...]:
    """The options of one call. They are not keys of the recipe."""
    run = kind.run if issubclass(kind, Recipe) else None
    return options_of(run) if run else ()


def example_of(kind: type[Recipe]) -> str:
    """An assignment for `--set` that this kind of recipe accepts, such as `seed=1`."""
    free = [o for o in options_of(kind) if not o.is_word and o.name not in kind.needs]
    if any(option.key == BUDGET for option in free):
        return f"{BUDGET}=6GiB"
    switches = [o for o in free if o.type is bool and o.default == "off" and o.name not in RISKY]
    numbers = [o for o in free if o.type is int and o.default.isdigit()]
    for option in (*switches, *numbers):
        return f"{option.key}={'true' if option.type is bool else option.default}"
    last = next(option for option in free if option.type is str)
    return f"{last.key}={last.flag.value or last.default}"


def all_options(kind: type[Section]) -> tuple[Option, ...]:
    """The options of a recipe, and those of one call."""
    return (*options_of(kind), *run_options_of(kind))


def flattened(
    kind: type[BaseModel], path: tuple[str, ...], presets: Mapping[str, Mapping[str, Any]]
) -> Iterator[Option]:
    """The options of a class and of its required sections."""
    for name, field in kind.model_fields.items():
        here = (*path, name)
        section = section_of(field)
        if section is not None and field.default is not None:
            yield from flattened(section, here, presets)
            continue
        flag = next((x for x in field.metadata if isinstance(x, Flag)), Flag())
        yield Option(
            name=flag.name or name,
            path=here,
            type=without_none(field.annotation),
            required=field.is_required(),
            default=default_words(field, flag, here, presets),
            group=ADVANCED if flag.advanced else declaring(kind, name).group,
            help=field.description or "",
            flag=flag,
        )


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a field, or None."""
    kind = without_none(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def choices_of(kind: Any) -> tuple[str, ...]:
    """The words of a `Literal`, or of a tuple of them; empty for other types."""
    if get_origin(kind) is tuple:
        kind = without_none(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ()


def without_none(annotation: Any) -> Any:
    """Remove metadata from a type, and the None that means "not given"."""
    if get_origin(annotation) is Annotated:
        return without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [without_none(k) for k in get_args(annotation) if k is not types.NoneType]
        return functools.reduce(operator.or_, kinds)
    return annotation


def declaring(kind: type[BaseModel], name: str) -> type[Section]:
    """The class that declares a field. The field is listed under its heading."""
    return next(
        base
        for base in reversed(kind.__mro__)
        if issubclass(base, Section) and name in base.model_fields
    )


def default_words(
    field: FieldInfo, flag: Flag, path: tuple[str, ...], presets: Mapping[str, Mapping[str, Any]]
) -> str:
    """The default of a field in words."""
    if flag.default is not None:
        return flag.default
    if any(holds(preset, path) for preset in presets.values()):
        return "the preset's"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        value = ", ".join(map(str, value))
    if value is None or value == "" or value == {}:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def holds(values: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    """Whether nested values have a value at a path."""
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True
