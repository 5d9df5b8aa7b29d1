"""Reads the facts: hardware, prices, published losses. A user's file replaces single entries.

Numbers have a range, and say where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import pydantic
import yaml

from secateur.errors import RecipeError
from secateur.models.shape import PlainDecoder

THIS_MACHINE = "this-machine"
"""The device whose memory and times are measured."""


class Estimate(NamedTuple):
    """A number that lies between two others: `typical` is the one to count with."""

    low: float
    typical: float
    high: float


def _rising(given: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse a range whose numbers fall."""
    if sorted(given) != list(given):
        raise ValueError("is [low, typical, high]")
    return given


Range = Annotated[
    tuple[pydantic.NonNegativeFloat, pydantic.NonNegativeFloat, pydantic.NonNegativeFloat],
    pydantic.AfterValidator(_rising),
]
Fraction = Annotated[float, pydantic.Field(gt=0, le=1)]
Fractions = Annotated[tuple[Fraction, Fraction, Fraction], pydantic.AfterValidator(_rising)]


class Entry(pydantic.BaseModel):
    """The base of all entries: no unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Hardware(Entry):
    """One device that a model runs on.

    Attributes:
        name: for people.
        kind: what runs the model: vLLM or its like on CUDA, llama.cpp on another GPU, or our
            kernels.
        memory_gib: what the driver reports; None for this machine, where it is read.
        bandwidth_gb_s: of the memory, from the data sheet; None for this machine.
        tflops: dense peak of matrix products, by the type of the values.
        semi_structured: whether it multiplies 2:4 matrices faster.
        usd_per_hour: what an hour costs: low, typical, high; None if nobody publishes it.
        price_source: where the price is from.
        source: where bandwidth and peak are from, if not the maker's data sheet.
    """

    name: str
    kind: Literal["cuda", "llama.cpp", "cpu"]
    memory_gib: pydantic.PositiveFloat | None = None
    bandwidth_gb_s: pydantic.PositiveFloat | None = None
    tflops: dict[str, pydantic.PositiveFloat] = {}
    semi_structured: bool = False
    usd_per_hour: Range | None = None
    price_source: str = "given by the user"
    source: str = ""


class Efficiency(Entry):
    """The fractions of a data sheet that engines reach, and the overhead of a layer."""

    bandwidth: Fractions
    compute: Fractions
    layer_microseconds: Range
    source: str

    def from_quick_to_slow(self) -> Iterator[tuple[float, float, float]]:
        """(bandwidth, compute, seconds of a layer) of a quick, a typical and a slow engine."""
        seconds = (1e-6 * each for each in self.layer_microseconds)
        return zip(reversed(self.bandwidth), reversed(self.compute), seconds, strict=True)


class PublishedLoss(Entry):
    """What one part of a way costs: the fraction of the task accuracy that stays, low to high."""

    kept: tuple[float, float]
    source: str


class Facts(Entry):
    """Everything that the advice counts with.

    Attributes:
        date: when the entries were collected.
        hardware: devices, by name.
        efficiency: by kind of device.
        training_compute: the fraction of the peak that training reaches.
        compressions: published losses, by part of a way.
        pruning_seconds_of_7b: time to prune a model of seven billion parameters, by method.
        shapes: well-known models, by name.
    """

    date: date
    hardware: dict[str, Hardware]
    efficiency: dict[str, Efficiency]
    training_compute: Fractions
    compressions: dict[str, PublishedLoss]
    pruning_seconds_of_7b: dict[str, float]
    shapes: dict[str, PlainDecoder]

    @pydantic.model_validator(mode="after")
    def check(self) -> Facts:
        """Every device but this machine, which is timed, has a data sheet."""
        for name, one in self.hardware.items():
            sheet = one.memory_gib and one.bandwidth_gb_s and "bf16" in one.tflops
            if name != THIS_MACHINE and not sheet:
                raise ValueError(f"{name} needs memory_gib, bandwidth_gb_s and tflops.bf16")
        return self

    def known_name(self, name: str) -> str:
        """The name of a device, as it stands here; capitals and signs do not matter.

        Raises:
            RecipeError: there is none; near names are given.
        """
        wanted, known = _plain(name), self.hardware
        for one in known:
            if wanted == _plain(one):
                return one
        near = [one for one in known if wanted and wanted in _plain(one + known[one].name)]
        near = near or get_close_matches(name, known, n=4, cutoff=0.5) or list(known)
        raise RecipeError(
            f"no hardware is called {name!r}",
            where="--hardware",
            remedy=f"name one of: {', '.join(near)}; or describe yours with --facts",
        )


def _plain(name: str) -> str:
    """A name without signs and capitals."""
    return "".join(filter(str.isalnum, name.lower()))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], depth: int = 2) -> dict[str, Any]:
    """Entries of `over` replace those of `base`; tables are joined down to a depth."""
    joined = dict(base)
    for key, value in over.items():
        deeper = depth > 0 and isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        joined[key] = _merged(base[key], value, depth - 1) if deeper else value
    return joined


@cache
def _own_facts() -> dict[str, Any]:
    """The facts of this package, as they stand in the file."""
    text = files("secateur.advisor").joinpath("facts.yaml").read_text("utf-8")
    return cast("dict[str, Any]", yaml.safe_load(text))


def read_facts(override: Path | None = None) -> Facts:
    """The facts of this package, with those of a user's file in their place.

    Args:
        override: a YAML file of the same form; only what differs.

    Raises:
        RecipeError: the file cannot be read, or an entry is wrong; says which.
    """
    place, remedy = str(override or "facts.yaml"), "see `secateur/advisor/facts.yaml` for the form"
    given: Any = {}
    if override is not None:
        try:
            given = yaml.safe_load(override.read_text("utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"the facts cannot be read: {error}", where=place) from None
    if not isinstance(given, Mapping):
        raise RecipeError("the facts are no table of names", where=place, remedy=remedy)
    try:
        return Facts.model_validate(_merged(_own_facts(), given))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"])) or "facts"
        said = f"{entry}: {first['msg'].removeprefix('Value error, ')}"
        raise RecipeError(said, where=place, remedy=remedy) from None
