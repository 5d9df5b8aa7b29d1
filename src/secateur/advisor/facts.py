"""Reads the facts: hardware, prices, published losses. A user's file replaces single entries.

Numbers have a range, and say where they come from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import RecipeError
from secateur.models.plain_decoder import PlainDecoder

THIS_MACHINE = "this-machine"
"""The device whose memory and times are measured."""


GIVEN = "given by the user"
"""The source of a price that is not from our facts."""


class Entry(BaseModel):
    """The base of all entries: no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Range = Annotated[tuple[float, float, float], Field(description="low, typical, high")]


KINDS = ("cuda", "llama.cpp", "cpu")
"""What runs the model: vLLM or its like on CUDA, llama.cpp on another GPU, or our kernels."""

LIFE_HOURS, USD_PER_KWH = 3 * 8760, 0.15
"""Over how many hours a bought device is paid off, and its electricity; our estimates."""


class Purchase(Entry):
    """A device that people own.

    Attributes:
        usd: list prices: low, typical, high.
        watts: while it works.
    """

    usd: Range
    watts: float

    @property
    def usd_per_hour(self) -> Range:
        """Usd / life + watts · price of electricity."""
        low, typical, high = (
            round(usd / LIFE_HOURS + self.watts / 1000 * USD_PER_KWH, 4) for usd in self.usd
        )
        return low, typical, high

    @property
    def source(self) -> str:
        """Where its price for an hour is from."""
        return (
            f"our estimate: {self.usd[1]:,.0f} USD ({self.usd[0]:,.0f} to {self.usd[2]:,.0f}) over "
            f"three years, and {self.watts:g} W at {USD_PER_KWH} USD a kWh"
        )


class Hardware(Entry):
    """One device that a model runs on.

    Attributes:
        name: for people.
        kind: one of `KINDS`.
        memory_gib: what the driver reports; None for this machine, where it is read.
        bandwidth_gb_s: of the memory, from the data sheet; None for this machine.
        tflops: dense peak of matrix products, by the type of the values.
        semi_structured: whether it multiplies 2:4 matrices faster.
        usd_per_hour: price of one device, on demand: low, typical, high.
        price_source: where the price is from.
        spot_usd_per_hour: of a device that can be taken away at any time; None if nobody says.
        spot_source: where that price is from.
        bought: what it costs to own; `usd_per_hour` is computed from it. None for rented ones.
        source: where bandwidth and peak are from, if not the maker's data sheet.
    """

    name: str
    kind: str
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    tflops: dict[str, float] = {}
    semi_structured: bool = False
    usd_per_hour: Range
    price_source: str = GIVEN
    spot_usd_per_hour: Range | None = None
    spot_source: str = GIVEN
    bought: Purchase | None = None
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def price_of_bought(cls, given: Any) -> Any:
        """The price of an hour of a bought device, where none is given."""
        if not isinstance(given, Mapping) or "usd_per_hour" in given or "bought" not in given:
            return given
        bought = Purchase.model_validate(given["bought"])
        return {"price_source": bought.source, **given, "usd_per_hour": bought.usd_per_hour}

    @model_validator(mode="after")
    def check(self) -> Hardware:
        """Prices rise from low to high; nothing is negative."""
        for name in ("usd_per_hour", "spot_usd_per_hour"):
            price = getattr(self, name)
            if price is not None and (sorted(price) != list(price) or price[0] < 0):
                raise ValueError(f"{name} is [low, typical, high]")
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of: {', '.join(KINDS)}")
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
    """A hosted model: USD for a million tokens, and how quick it is."""

    input: float
    output: float
    source: str
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    speed_source: str = ""

    def seconds(self, tokens: int) -> float | None:
        """The median time of an answer of so many tokens; None if nobody published it."""
        if self.first_token_seconds is None or self.tokens_per_second is None:
            return None
        return self.first_token_seconds + tokens / self.tokens_per_second


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

    def known_name(self, name: str) -> str:
        """The name of a device, as it stands here; capitals and signs do not matter.

        Raises:
            RecipeError: there is none; near names are given.
        """
        wanted = _plain(name)
        same = [n for n in self.hardware if n == name or _plain(n) == wanted]
        if same:
            return same[0]
        near = [n for n, one in self.hardware.items() if wanted and wanted in _plain(n + one.name)]
        near = near or get_close_matches(name, self.hardware, n=4, cutoff=0.5) or [*self.hardware]
        raise RecipeError(
            f"no hardware is called {name!r}",
            where="--hardware",
            remedy=f"name one of: {names_by_size(near)}; or describe yours with --facts",
        )

    def device(self, name: str) -> Hardware:
        """A device by name; see `known_name`."""
        return self.hardware[self.known_name(name)]

    def at_spot_prices(self) -> Facts:
        """The same, with the prices of devices that can be taken away, where they are known."""
        spot = {
            name: one.model_copy(
                update={"usd_per_hour": one.spot_usd_per_hour, "price_source": one.spot_source}
            )
            for name, one in self.hardware.items()
            if one.spot_usd_per_hour is not None
        }
        return self.model_copy(update={"hardware": {**self.hardware, **spot}})

    def price(self, device: Hardware) -> Estimate:
        """The price of one device for an hour, in USD."""
        return Estimate(*device.usd_per_hour)


def names_by_size(names: Sequence[str]) -> str:
    """Names for a message; those that differ in the size of the memory are one."""
    sizes: dict[str, list[str]] = {}
    for name in names:
        stem, _, size = name.rpartition("-")
        sized = size.endswith("gb")
        sizes.setdefault(f"{stem}-" if sized else name, []).append(size if sized else "")
    return ", ".join(stem + "/".join(each) for stem, each in sizes.items())


def _plain(name: str) -> str:
    """A name without signs and capitals."""
    return "".join(filter(str.isalnum, name.lower()))


def _each_size(given: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with one entry of hardware for each size of memory."""
    hardware = given.get("hardware")
    if not isinstance(hardware, Mapping):
        return dict(given)
    found: dict[str, Any] = {}
    for name, entry in hardware.items():
        sizes = entry.get("sizes_gb") if isinstance(entry, Mapping) else None
        usable = entry.get("usable", 1) if isinstance(entry, Mapping) else 1
        numbers: list[Any] = [usable, *sizes] if isinstance(sizes, list) else [None]
        if not all(isinstance(number, int | float) for number in numbers):
            found[name] = entry  # it has one size, or the fault is found when it is read
            continue
        rest = {key: value for key, value in entry.items() if key not in ("sizes_gb", "usable")}
        for size in numbers[1:]:
            free = {"memory_gib": round(size * usable, 1)}
            words = {"name": f"{entry.get('name', name)}, {size} GB"}
            found[f"{name}-{size}gb"] = {**rest, **words, **free}
    return {**given, "hardware": found}


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
    return _each_size(cast("dict[str, Any]", yaml.safe_load(text)))


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
        return Facts.model_validate(_merged(_own_facts(), _each_size(given)))
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
