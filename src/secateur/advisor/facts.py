"""Reads the facts: hardware, prices, published losses. A user's file replaces single entries.

Numbers have a range, and say where they come from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import RecipeError
from secateur.models.plain_decoder import PlainDecoder
from secateur.registry import did_you_mean

THIS_MACHINE = "this-machine"
"""The device whose memory and times are measured."""


GIVEN = "given by the user"
"""The source of a price that is not from our facts."""


class Entry(BaseModel):
    """The base of all entries: no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Range = Annotated[tuple[float, float, float], Field(description="low, typical, high")]


class Hardware(Entry):
    """One device that a model runs on.

    Attributes:
        name: for people.
        kind: `cuda` or `cpu`.
        memory_gib: what the driver reports; None for this machine, where it is read.
        bandwidth_gb_s: of the memory, from the data sheet; None for this machine.
        tflops: dense peak of matrix products, by the type of the values.
        semi_structured: whether it multiplies 2:4 matrices faster.
        usd_per_hour: price of one device: low, typical, high.
        price_source: where the price is from.
    """

    name: str
    kind: str
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    tflops: dict[str, float] = {}
    semi_structured: bool = False
    usd_per_hour: Range
    price_source: str = GIVEN

    @model_validator(mode="after")
    def check(self) -> Hardware:
        """Prices rise from low to high; nothing is negative."""
        if sorted(self.usd_per_hour) != list(self.usd_per_hour) or self.usd_per_hour[0] < 0:
            raise ValueError("usd_per_hour is [low, typical, high]")
        if self.kind not in ("cuda", "cpu"):
            raise ValueError("kind is cuda or cpu")
        sizes = (self.memory_gib, self.bandwidth_gb_s, *self.tflops.values())
        if any(size is not None and size <= 0 for size in sizes):
            raise ValueError("memory_gib, bandwidth_gb_s and tflops are larger than 0")
        return self

    @property
    def on_paper(self) -> bool:
        """Whether its data sheet says enough for the roofline."""
        return bool(self.memory_gib and self.bandwidth_gb_s and self.tflops.get("bf16"))


class Efficiency(Entry):
    """The fractions of a data sheet that engines reach, and the overhead of a layer."""

    bandwidth: Range
    compute: Range
    layer_microseconds: Range
    source: str

    @model_validator(mode="after")
    def check(self) -> Efficiency:
        """A fraction is above 0 and at most 1, and rises from low to high."""
        for name in ("bandwidth", "compute"):
            low, typical, high = getattr(self, name)
            if not 0 < low <= typical <= high <= 1:
                raise ValueError(f"{name} is [low, typical, high], above 0 and at most 1")
        return self


class PublishedLoss(Entry):
    """What one way costs in quality: the fraction of the task accuracy that stays, low to high."""

    kept: tuple[float, float]
    source: str


class API(Entry):
    """A hosted model: USD for a million tokens."""

    input: float
    output: float
    source: str


class Facts(Entry):
    """Everything that the advice counts with.

    Attributes:
        date: when the entries were collected.
        hardware: devices, by name.
        efficiency: by kind of device.
        training_compute: the fraction of the peak that training reaches: low, typical, high.
        compressions: published losses, by option.
        pruning_seconds_of_7b: time to prune a model of seven billion parameters, by method.
        apis: hosted models, by name.
        shapes: well-known models, by name.
    """

    date: date
    hardware: dict[str, Hardware]
    efficiency: dict[str, Efficiency]
    training_compute: Range
    compressions: dict[str, PublishedLoss]
    pruning_seconds_of_7b: dict[str, float]
    apis: dict[str, API]
    shapes: dict[str, PlainDecoder]

    @model_validator(mode="after")
    def check(self) -> Facts:
        """Every device but this machine, which is timed, has a data sheet."""
        for name, device in self.hardware.items():
            if name != THIS_MACHINE and not device.on_paper:
                raise ValueError(f"{name} needs memory_gib, bandwidth_gb_s and tflops.bf16")
            if device.kind not in self.efficiency:
                raise ValueError(f"efficiency has no {device.kind}, which {name} is")
        return self

    def device(self, name: str) -> Hardware:
        """A device by name.

        Raises:
            RecipeError: there is none; near names are given.
        """
        if name not in self.hardware:
            raise RecipeError(
                f"no hardware is called {name!r}",
                where="--hardware",
                remedy=f"{did_you_mean(name, [*self.hardware])}; or describe yours with --facts",
            )
        return self.hardware[name]

    def price(self, device: Hardware) -> Estimate:
        """The price of one device for an hour, in USD."""
        return Estimate(*device.usd_per_hour)


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
    given: Any = {}
    if override is not None:
        try:
            given = yaml.safe_load(override.read_text("utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(
                f"the facts cannot be read: {error}", where=str(override), remedy="give a YAML file"
            ) from None
        if not isinstance(given, Mapping):
            raise RecipeError(
                "the facts are no table of names", where=str(override),
                remedy="see `secateur/advisor/facts.yaml` for the form",
            )  # fmt: skip
    try:
        return Facts.model_validate(_merged(_own_facts(), given))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}." for part in first["loc"]).removesuffix(".")
        said = first["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"{place}: {said}" if place else said,
            where=str(override or "facts.yaml"),
            remedy="see `secateur/advisor/facts.yaml` for the form",
        ) from None


MEASURED = "measured here"
PUBLISHED = "published"
ESTIMATED = "estimated"


@dataclass(frozen=True)
class Estimate:
    """A number that lies between two others.

    Attributes:
        low: the least.
        typical: the one to count with.
        high: the most.
    """

    low: float
    typical: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without a range."""
        return cls(value, value, value)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Apply a function; a falling one swaps the ends."""
        ends = [function(self.low), function(self.high)]
        return Estimate(min(ends), function(self.typical), max(ends))

    def _by_end(self, join: Callable[[float, float], float], other: Estimate) -> Estimate:
        return Estimate(
            join(self.low, other.low),
            join(self.typical, other.typical),
            join(self.high, other.high),
        )

    def __add__(self, other: Estimate) -> Estimate:
        """The sum; both low ends together, both high ends together."""
        return self._by_end(operator.add, other)

    def __mul__(self, factor: float) -> Estimate:
        """The multiple by a number that is not negative."""
        return Estimate(self.low * factor, self.typical * factor, self.high * factor)

    def times(self, other: Estimate) -> Estimate:
        """The product; both low ends together, both high ends together."""
        return self._by_end(operator.mul, other)

    def larger(self, other: Estimate) -> Estimate:
        """The larger one, end by end."""
        return self._by_end(max, other)
