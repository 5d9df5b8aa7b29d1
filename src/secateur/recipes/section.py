"""The base of all sections of a recipe: strict fields, their heading in the help, their flags.

A field is declared once, here in `recipes/`. The YAML key, the flag, the Python keyword and the row
in docs/options.md all come from it (`options.py` lists the fields; `tools/option_files.py` writes
the page and the stub).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic import Strict as Strictness

WHAT = "What"
TEACHER = "Teacher"
HOW = "How"
CALIBRATION = "Calibration"
RECOVERY = "Recovery"
MEMORY = "Memory and device"
OUTPUT = "Output and run"
ADVANCED = "Advanced"

GROUPS = (WHAT, TEACHER, HOW, CALIBRATION, RECOVERY, MEMORY, OUTPUT, ADVANCED)
"""The headings of `--help`, in this order."""

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
        name: the keyword in Python; with dashes, the flag. None: the name of the field.
        short: a second flag, such as `-o`.
        off: the flag that switches a bool off. None: `--no-NAME`.
        default: the default in words. None: the default of the field.
        value: the word for the value in the help, such as DIR. Python may pass a path for DIR,
            FILE, MODEL and TEXT.
        commas: whether one flag takes several values, separated by commas.
        positional: whether it is a positional argument rather than a flag.
        hidden: whether it has no flag, only a YAML key and a Python keyword.
        advanced: whether the help lists it under `ADVANCED` and not with its section.
    """

    name: str | None = None
    short: str | None = None
    off: str | None = None
    default: str | None = None
    value: str | None = None
    commas: bool = False
    positional: bool = False
    hidden: bool = False
    advanced: bool = False


class Section(BaseModel):
    """Fields that belong together.

    Unknown keys are errors. Sections are frozen. A value must have the type of its field: `"0.5"`
    is text and not a number, and 1 is not true. A float field accepts whole numbers. Numbers must
    be finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    group: ClassVar[str] = HOW
    """The heading in `--help` of the fields that this class declares."""

    alone: ClassVar[tuple[type, ...]] = ()
    """Types of single values that may stand for the whole section."""

    @classmethod
    def opened(cls, value: Any) -> Any:
        """Turn a single value into the section that it stands for; return other values as is."""
        return value

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

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Options that change nothing unless one of these others is given or switched on; by name."""
