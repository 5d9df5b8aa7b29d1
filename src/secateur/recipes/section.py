"""What every section of a recipe is made of: strict fields, the group they are shown in, flags.

A field is declared once, here in `recipes/`. From it come the key in YAML, the flag, the keyword in
Python, and the row in docs/options.md (`options.py` flattens, `generated.py` writes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic import Strict as Strictness

__all__ = [
    "CALIBRATION",
    "GROUPS",
    "HOW",
    "MAX_SEED",
    "MEMORY",
    "OUTPUT",
    "RECOVERY",
    "WHAT_TO_COMPRESS",
    "WHAT_TO_CONTINUE",
    "WHAT_TO_CUT",
    "WHAT_TO_LEARN_FROM",
    "WHAT_TO_MEASURE",
    "WHAT_TO_PRUNE",
    "Flag",
    "Recipe",
    "Section",
    "Texts",
    "text_alone",
]

WHAT_TO_PRUNE = "What to prune"
WHAT_TO_CUT = "What to cut"
WHAT_TO_COMPRESS = "What to compress"
WHAT_TO_MEASURE = "What to measure"
WHAT_TO_CONTINUE = "What to continue"
WHAT_TO_LEARN_FROM = "What to learn from"
HOW = "How"
CALIBRATION = "Calibration"
RECOVERY = "Recovery"
MEMORY = "Memory and device"
OUTPUT = "Output and run"

GROUPS = (
    WHAT_TO_PRUNE,
    WHAT_TO_CUT,
    WHAT_TO_LEARN_FROM,
    WHAT_TO_COMPRESS,
    WHAT_TO_MEASURE,
    WHAT_TO_CONTINUE,
    HOW,
    CALIBRATION,
    RECOVERY,
    MEMORY,
    OUTPUT,
)
"""The headings of `--help`, in this order."""

MAX_SEED = 2**63 - 1
"""The largest seed that every generator takes."""

Texts = Annotated[tuple[str, ...], Strictness(False)]
"""Several texts. YAML has lists where Python has tuples."""


def text_alone(value: Any) -> Any:
    """`text: c4` is one text."""
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Flag:
    """How a field is called outside of its section, and what the help shows of it.

    Attributes:
        name: the keyword in Python; with dashes, the flag. None: the name of the field.
        short: a flag of one letter, such as `-o`.
        off: the flag that switches a bool off. None: `--no-NAME`.
        default: the words for the default. None: the default of the field.
        value: the word for the value in the help, such as DIR. A path may be given for DIR, FILE,
            MODEL and TEXT.
        commas: whether one flag takes several values with commas between.
        positional: whether it is a word of the command rather than a flag.
        hidden: whether there is no flag: the value is written in YAML or given in Python.
    """

    name: str | None = None
    short: str | None = None
    off: str | None = None
    default: str | None = None
    value: str | None = None
    commas: bool = False
    positional: bool = False
    hidden: bool = False


class Section(BaseModel):
    """Fields that belong together.

    Unknown keys are errors. A section does not change once it is made. A value must have the type
    of its field: `"0.5"` is text and not a number, and 1 is not true. A whole number is a number.
    Numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    group: ClassVar[str] = HOW
    """The heading in `--help` of the fields that this class declares."""

    alone: ClassVar[tuple[type, ...]] = ()
    """The types of a value that may be given in place of the section."""

    @classmethod
    def opened(cls, value: Any) -> Any:
        """The section that a value alone stands for; other values stay as they are."""
        return value

    @model_validator(mode="before")
    @classmethod
    def open_value(cls, value: Any) -> Any:
        """Let a value alone stand for the section."""
        return cls.opened(value)


class Recipe(Section):
    """All options of one verb that its result may depend on."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What the options `effort` fills in, by name."""

    run: ClassVar[type[Section] | None] = None
    """Options of a call: flags and keywords, but no keys of a recipe."""
