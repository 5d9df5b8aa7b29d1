"""How options are declared, and the flat list of them.

A recipe consists of sections, and a section of strict fields. A field is declared once, here in
`recipes/`. The YAML key, the flag, the Python keyword and the row on the site all come from it:
`options_of` lists the fields, and `tools/option_files.py` writes the pages and the stub.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import operator
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic import Strict as Strictness
from pydantic.fields import FieldInfo


class Heading:
    """The headings of `--help`."""

    WHAT = "What"
    TEACHER = "Teacher"
    HOW = "How"
    CALIBRATION = "Calibration"
    RECOVERY = "Recovery"
    MEMORY = "Memory and device"
    OUTPUT = "Output and run"
    ADVANCED = "Advanced"


GROUPS = [text for name, text in vars(Heading).items() if name.isupper()]
"""The headings in their order."""

MAX_SEED = 2**63 - 1
"""The largest seed that every random generator accepts."""

Texts = Annotated[tuple[str, ...], Strictness(False)]
"""Several texts. YAML has lists where Python has tuples."""


def text_alone(value: Any) -> Any:
    """Let `text: c4` mean a list of one text."""
    return (value,) if isinstance(value, str) else value


def matching(pattern: str, words: str) -> AfterValidator:
    """Require a text of some form.

    Args:
        pattern: a regular expression for the whole text.
        words: the form in words, for the error.
    """

    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f"must be {words}")
        return value

    return AfterValidator(check)


@dataclass(frozen=True)
class Flag:
    """The name of a field outside its section, and how the help shows it.

    Attributes:
        name: the keyword in Python; with dashes, the flag. None: the name of the field. A field of
            a section that may be missing has a flag only if it has a name here.
        short: a second flag, such as `-o`.
        aliases: flags of other tools that mean the same, without dashes. The command line accepts
            them, and nothing shows them.
        off: the flag that switches a bool off. None: `--no-NAME`.
        default: the default in words. None: the default of the field.
        value: the word for the value in the help, such as DIR. Python may pass a path for DIR,
            FILE, MODEL and TEXT.
        commas: whether one flag takes several values, separated by commas.
        positional: whether it is a positional argument rather than a flag.
        hidden: whether it has no flag, only a YAML key and a Python keyword.
        advanced: whether the help lists it under `Heading.ADVANCED` and not with its section.
        own_text: the text that is read where none is named and the model is a sample: a field of
            `models.samples.OwnTexts`.
    """

    name: str | None = None
    short: str | None = None
    aliases: tuple[str, ...] = ()
    off: str | None = None
    default: str | None = None
    value: str | None = None
    commas: bool = False
    positional: bool = False
    hidden: bool = False
    advanced: bool = False
    own_text: str | None = None


@dataclass(frozen=True)
class Conflict:
    """Two options that do not go together: one row of the table of a recipe.

    An option counts if its value is not the default or a number that was given, and `NAME=VALUE` if
    it has this value. Several are separated by `or`. A row without options holds for every recipe.

    Attributes:
        option: one of the two.
        other: the other.
        reason: why.
        remedy: what to do.
        unless: options with which the two go together.
    """

    option: str
    other: str
    reason: str
    remedy: str
    unless: str = ""


class Section(BaseModel):
    """Fields that belong together.

    Unknown keys are errors. Sections are frozen. A value must have the type of its field: `"0.5"`
    is text and not a number, and 1 is not true. A float field accepts whole numbers. Numbers must
    be finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    group: ClassVar[str] = Heading.HOW
    """The heading in `--help` of the fields that this class declares."""

    alone: ClassVar[Mapping[type, str]] = {}
    """Types of single values that may stand for the whole section, and the field that they give."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Options that change nothing unless one of these others is given or switched on; by name."""

    conflicts: ClassVar[tuple[Conflict, ...]] = ()
    """Options that do not go together."""

    @classmethod
    def opened(cls, value: Any) -> Any:
        """Turn a single value into the section that it stands for; return other values as is."""
        fits = (name for kind, name in cls.alone.items() if isinstance(value, kind))
        name = None if isinstance(value, bool) else next(fits, None)
        return value if name is None else {name: value}

    @model_validator(mode="before")
    @classmethod
    def open_value(cls, value: Any) -> Any:
        """Accept a single value in place of the section."""
        return cls.opened(value)


class Recipe(Section):
    """All options of one verb that can change its result."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The values that each `effort` fills in."""

    run: ClassVar[type[Section] | None] = None
    """Options of one call: flags and keywords, but not keys of a recipe."""


PATHS = ("DIR", "FILE", "MODEL", "RECIPE", "SOURCE", "TEXT")
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
        several = get_origin(self.type) is tuple
        kind = without_none(get_args(self.type)[0]) if several else self.type
        return get_args(kind) if get_origin(kind) is Literal else ()

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
    found = list(_flattened(kind, (), presets))
    return tuple(sorted(found, key=lambda option: GROUPS.index(option.group)))


def run_options_of(kind: type[Section]) -> tuple[Option, ...]:
    """The options of one call. They are not keys of the recipe."""
    run = kind.run if issubclass(kind, Recipe) else None
    return options_of(run) if run else ()


def all_options(kind: type[Section]) -> tuple[Option, ...]:
    """The options of a recipe, and those of one call."""
    return (*options_of(kind), *run_options_of(kind))


def _flattened(
    kind: type[BaseModel], path: tuple[str, ...], presets: Mapping[str, Mapping[str, Any]]
) -> Iterator[Option]:
    """The options of a class and of its sections; of a section that may be missing, those with a
    name of their own.
    """
    for name, field in kind.model_fields.items():
        here = (*path, name)
        section = section_of(field)
        if section is not None and field.default is not None:
            yield from _flattened(section, here, presets)
            continue
        flag = next((x for x in field.metadata if isinstance(x, Flag)), Flag())
        sections = (x for x in reversed(kind.__mro__) if issubclass(x, Section))
        declaring = next(x for x in sections if name in x.model_fields)
        home = next(x for x in kind.__mro__ if name in vars(x).get("__annotations__", ()))
        yield Option(
            name=flag.name or name,
            path=here,
            type=without_none(field.annotation),
            required=field.is_required(),
            default=_default_words(field, flag, here, presets),
            group=Heading.ADVANCED if flag.advanced else declaring.group,
            help=field.description
            or _docstrings(home.__module__).get((home.__qualname__, name), ""),
            flag=flag,
        )
        if section is not None:
            yield from (x for x in _flattened(section, here, presets) if x.flag.name)


@functools.cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """The strings below the fields of a module's classes. pydantic's own reader is slow."""
    found = {}
    for part in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(part, ast.ClassDef):
            for field, below in itertools.pairwise(part.body):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    text = ast.literal_eval(below.value)
                    found[part.name, ast.unparse(field.target)] = " ".join(text.split())
    return found


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a field, or None."""
    kind = without_none(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def without_none(annotation: Any) -> Any:
    """Remove metadata from a type, and the None that means "not given"."""
    if get_origin(annotation) is Annotated:
        return without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [without_none(k) for k in get_args(annotation) if k is not types.NoneType]
        return functools.reduce(operator.or_, kinds)
    return annotation


def _default_words(
    field: FieldInfo, flag: Flag, path: tuple[str, ...], presets: Mapping[str, Mapping[str, Any]]
) -> str:
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


UNITS = {
    **{f"{letter}B": 1000**power for power, letter in enumerate(("", "k", "M", "G", "T"))},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}


def bytes_of(size: int | str) -> int:
    """The bytes of a size.

    Args:
        size: a number of bytes, or a number with a unit. Upper and lower case are the same.

    Raises:
        ValueError: it is no size; the message names the units.

    Example:
        >>> from secateur.recipes.options import bytes_of
        >>> bytes_of("90MiB"), bytes_of("6e9"), bytes_of(4096)
        (94371840, 6000000000, 4096)
    """
    if isinstance(size, int):
        return size
    units = {name.lower(): factor for name, factor in UNITS.items()}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)\s*", size.lower())
    if found is None or (found[2] or "b") not in units:
        raise ValueError(
            f"must be a number of bytes, or a number with a unit ({', '.join(UNITS)}), such as 6GiB"
        )
    return round(float(found[1]) * units[found[2] or "b"])


def _checked(size: Any) -> Any:
    """The same size, if it is one."""
    if isinstance(size, float) and size.is_integer():  # 6e9 in YAML
        size = int(size)
    if isinstance(size, str) or (isinstance(size, int) and size < 0):
        bytes_of(str(size))
    return size


NO_SIZE = 10_000
"""A number without a unit that is smaller lacks its unit."""


def _positive(size: Any) -> Any:
    """The same size, if it is more than 0 bytes."""
    size = _checked(size)
    if isinstance(size, int | str) and bytes_of(size) == 0:
        raise ValueError("must be more than 0 bytes")
    if str(size).strip().isdecimal() and int(size) < NO_SIZE:
        raise ValueError(
            f"must be given with its unit, such as {size}MiB; without one it is {size} bytes"
        )
    return size


Size = Annotated[int | str, BeforeValidator(_positive)]
"""More than 0 bytes. The recipe keeps what the user wrote; `bytes_of` gives the bytes."""

SizeOrZero = Annotated[int | str, BeforeValidator(_checked)]
"""0 bytes or more."""
