"""Compares the options under a load and decides: leave it, quantize, prune, both, or distill.

An option is *safe* if even its lowest published accuracy keeps the bound, *possible* if its highest
does. Among the safe ones the cheapest to serve wins; if several cost the
same, the one that changes least. Possible ones are named with the advice to measure.

A device costs the same however little it serves. For a load that needs less than half of one, the
verdict begins with that, and names the hosted model and the other device that would cost less.

When nothing serves a load within its bounds, the advice names those that would have to be looser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from secateur.advisor.capacity import GIB, Capacity, Load, ServingDevice, TooMuch, capacity_of
from secateur.advisor.facts import Estimate, Facts, Hardware
from secateur.advisor.money import (
    APICost,
    Making,
    ServingCost,
    api_cost,
    break_even_months,
    cost_of,
    making_of,
)
from secateur.advisor.options import CompressionWay, options_for
from secateur.advisor.shape import ModelShape

LEAST_SAVING = 0.05
"""A change that saves less than this part of the cost is not worth its risk."""

FILLED = 0.5
"""A load that needs less than this part of one device does not fill it."""

LEAST_USD = 10.0
"""USD a month below which another place to serve is not worth a word."""

Place = tuple[Hardware, ServingDevice]
"""A device, and its memory and speed."""


@dataclass(frozen=True)
class Need:
    """What the user wants.

    Attributes:
        load: requests and latencies.
        quality_loss: the fraction of the accuracy that may go; None for any.
        gpu_hours: the most for making the model; None for any.
    """

    load: Load
    quality_loss: float | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True)
class Considered:
    """One option, computed.

    Attributes:
        option: the way.
        kept: the fraction of the accuracy that stays, published: low, high.
        capacity: the devices, or why none suffice.
        cost: of serving; None if it cannot serve.
        making: what it costs to make.
        refused: why it is out: quality, hours or capacity; empty if it is in.
        safe: whether even the lowest published accuracy keeps the bound.
    """

    option: CompressionWay
    kept: tuple[float, float]
    capacity: Capacity | TooMuch
    cost: ServingCost | None
    making: Making
    refused: str
    safe: bool

    @property
    def possible(self) -> bool:
        """Whether it may be taken after measuring."""
        return not self.refused


@dataclass(frozen=True)
class Elsewhere:
    """Another device that serves the same load within the same bounds for less.

    Attributes:
        device: what it is.
        devices: how many the load needs.
        option: the cheapest safe option on it.
        month: USD, typical.
        step: seconds between two tokens, typical.
    """

    device: str
    devices: int
    option: str
    month: float
    step: float


@dataclass(frozen=True)
class Advice:
    """The decision.

    Attributes:
        model: the sizes.
        device: what it was computed for.
        considered: all options, in order of cost; those that are out come last.
        chosen: the option to take; None if none can serve.
        cheaper: options that cost less and may keep the bound: measure them.
        apis: hosted models under the same load, beside the chosen option.
        filled: the part of the devices of the chosen option that the busiest moment needs.
        hosted: the cheapest hosted model, if it costs less than the chosen option.
        elsewhere: the cheapest other device, if the load does not fill this one.
        paid_back_months: until the saved money has paid for the making; None if none is saved.
        verdict: what to do, in one to three sentences.
    """

    model: ModelShape
    device: Hardware
    considered: tuple[Considered, ...]
    chosen: Considered | None
    cheaper: tuple[Considered, ...]
    apis: tuple[APICost, ...]
    filled: float
    hosted: APICost | None
    elsewhere: Elsewhere | None
    paid_back_months: float | None
    verdict: str


def advise_on(
    model: ModelShape,
    hardware: Hardware,
    device: ServingDevice,
    facts: Facts,
    need: Need,
    others: Sequence[Place] = (),
) -> Advice:
    """Compute every option and decide.

    Args:
        model: its sizes.
        hardware: what it runs on, with its price.
        device: its memory and speed.
        facts: prices and published losses.
        need: the load and the bounds.
        others: devices to name instead, if the load does not fill this one.
    """
    price = facts.price(hardware)
    rows = considered(model, (hardware, device), facts, need)
    base = next(row for row in rows if row.option.changed == 0)
    safe = [row for row in rows if row.possible and row.safe]
    chosen = _choose(safe, base)
    dearest = chosen.cost.month.typical if chosen and chosen.cost else float("inf")
    cheaper = tuple(
        row for row in rows
        if row.possible and not row.safe and row.cost and row.cost.month.typical < dearest
    )  # fmt: skip
    apis: tuple[APICost, ...] = ()
    filled = 1.0
    if chosen is not None and isinstance(chosen.capacity, Capacity):
        apis = tuple(
            api_cost(name, api, chosen.capacity, need.load, price)
            for name, api in facts.apis.items()
        )
        filled = chosen.capacity.used(need.load)
    hosted = min(apis, key=lambda api: api.month, default=None)
    if hosted is not None and hosted.month > dearest - LEAST_USD:
        hosted = None
    alone = chosen and isinstance(chosen.capacity, Capacity) and chosen.capacity.replicas == 1
    empty = filled < FILLED and alone
    elsewhere = _cheapest(model, others, facts, need) if empty else None
    if elsewhere is not None and elsewhere.month > dearest - LEAST_USD:
        elsewhere = None
    months = None
    if chosen is not None and chosen.cost is not None and base.cost is not None:
        months = break_even_months(chosen.making, base.cost, chosen.cost)
    verdict = _verdict_on(chosen, cheaper)
    if chosen is not None and empty and (hosted or elsewhere):
        first = _instead_of(chosen, hardware, filled, hosted, elsewhere)
        verdict = f"{first} On this device, {verdict[0].lower()}{verdict[1:]}"
    elif hosted is not None:
        verdict += f" A hosted model costs less ({_priced(hosted.name, hosted.month)}): compare."
    return Advice(
        model, hardware, tuple(rows), chosen, cheaper, apis, filled, hosted, elsewhere, months,
        verdict,
    )  # fmt: skip


def considered(model: ModelShape, place: Place, facts: Facts, need: Need) -> list[Considered]:
    """All options on a device, those that can serve first, the cheapest first."""
    hardware, device = place
    price = facts.price(hardware)
    options = options_for(model, hardware)
    rows = [_consider(model, option, device, facts, need, price) for option in options]
    return sorted(rows, key=_order)


def _cheapest(
    model: ModelShape, places: Sequence[Place], facts: Facts, need: Need
) -> Elsewhere | None:
    """The cheapest way to serve a load on other devices that surely keeps the bounds, if any."""
    found = []
    for place in places:
        rows = considered(model, place, facts, need)
        row = next((row for row in rows if row.possible and row.safe), None)
        if row is not None and row.cost is not None and isinstance(row.capacity, Capacity):
            many, step = round(row.capacity.devices.typical), row.capacity.step.typical
            month = row.cost.month.typical
            found.append(Elsewhere(place[0].name, many, row.option.name, month, step))
    return min(found, key=lambda one: one.month, default=None)


def _instead_of(
    chosen: Considered,
    device: Hardware,
    filled: float,
    hosted: APICost | None,
    elsewhere: Elsewhere | None,
) -> str:
    """What to do with a load that is too small for a device: two sentences."""
    assert isinstance(chosen.capacity, Capacity)
    share = "under 1%" if filled < 0.01 else f"{100 * filled:.0f}%"
    ways = [] if hosted is None else [f"a hosted model ({_priced(hosted.name, hosted.month)})"]
    if elsewhere is not None:
        name = _several(elsewhere.devices, elsewhere.device)
        name += "" if elsewhere.option == "as it is" else f", {elsewhere.option}"
        speed = f"{1e3 * elsewhere.step:.0f} ms/token"
        ways.append(f"smaller hardware ({_priced(name, elsewhere.month)}, {speed})")
    return (
        "This load does not fill a device: it needs "
        f"{share} of {_several(chosen.capacity.shared_by, device.name, 'one ')}. "
        f"Use {' or '.join(ways)}."
    )


def _several(count: int, name: str, one: str = "") -> str:
    """A device, or how many of it; `one` stands before a single one."""
    return f"{one}{name}" if count == 1 else f"{count} x {name}"


def _priced(name: str, month: float) -> str:
    """A name and a price for people."""
    return f"{name}: {month:,.0f} USD a month" if month >= 1 else f"{name}: under 1 USD a month"


def _consider(
    model: ModelShape,
    option: CompressionWay,
    device: ServingDevice,
    facts: Facts,
    need: Need,
    price: Estimate,
) -> Considered:
    """Compute one option."""
    kept = option.kept(facts)
    making = making_of(model, option, facts)
    found = capacity_of(model, option, device, need.load)
    cost = cost_of(found, need.load, price) if isinstance(found, Capacity) else None
    floor = 0.0 if need.quality_loss is None else 1 - need.quality_loss
    refused = ""
    if isinstance(found, TooMuch):
        refused = found.reason
    elif kept[1] < floor:
        refused = f"keeps {kept[0]:.1%} to {kept[1]:.1%} of the accuracy, {floor:.1%} required"
    elif need.gpu_hours is not None and making.gpu_hours.typical > need.gpu_hours:
        refused = (
            f"takes {making.gpu_hours.typical:,.0f} GPU hours to make, {need.gpu_hours:g} allowed"
        )
    return Considered(option, kept, found, cost, making, refused, kept[0] >= floor)


def _order(row: Considered) -> tuple[bool, float, int, float]:
    """Cheapest first, then the least changed, then what surely keeps more; those out last."""
    month = row.cost.month.typical if row.cost else float("inf")
    return bool(row.refused), month, row.option.changed, -row.kept[0]


def _choose(safe: Sequence[Considered], base: Considered) -> Considered | None:
    """The cheapest safe option; the model itself if it costs hardly more."""
    if not safe:
        return None
    best = safe[0]
    if base in safe and base.cost and best.cost:
        least = (1 - LEAST_SAVING) * base.cost.month.typical
        if best.cost.month.typical > least:
            return base
    return best


def _verdict_on(chosen: Considered | None, cheaper: Sequence[Considered]) -> str:
    """One sentence for people."""
    hint = (
        f" {cheaper[0].option.name} would be cheaper and may meet your limits: measure its loss."
        if cheaper
        else ""
    )
    if chosen is None:
        return f"No option is certain to serve this load within your limits.{hint}"
    if chosen.option.changed == 0:
        return f"Leave the model as it is: no cheaper option is certain to meet your limits.{hint}"
    option = chosen.option
    only = option.structure.name == "whole" and option.zeros.name == "dense"
    verb = "Only quantize" if only else "Distill" if option.structure.tokens else "Prune"
    if not only and option.values.name != "bf16":
        verb += " and quantize"
    return f"{verb}: {option.name}.{hint}"


def nearest(rows: Sequence[Considered], need: Need) -> Iterator[str]:
    """The nearest bounds that can be kept, a sentence for each; each is enough alone.

    Args:
        rows: all options, of which none is chosen.
        need: the load and the bounds.
    """
    served = [row for row in rows if row.cost is not None]
    if served and need.quality_loss is not None:
        best = max(served, key=lambda row: row.kept[0])
        loss = math.ceil(1000 * (1 - best.kept[0])) / 1000
        if loss < 1:
            yield f"{best.option.name} serves it with --quality-loss {loss:g}"
    if served and need.gpu_hours is not None:
        least = min(served, key=lambda row: row.making.gpu_hours.typical)
        hours = math.ceil(least.making.gpu_hours.typical)
        if hours > need.gpu_hours:
            yield f"{least.option.name} takes --gpu-hours {hours}"
    floor = 0.0 if need.quality_loss is None else 1 - need.quality_loss
    for bound, flag, unit in (
        ("token_ms", "--latency-p99-ms", "ms between two tokens"),
        ("first_token_ms", "--first-token-ms", "ms to the first token"),
    ):
        quick = min(_misses(rows, bound, floor), default=None)
        if quick is not None:
            least_ms = math.ceil(10 * quick[0]) / 10
            yield f"{quick[1]} has {least_ms:g} {unit}: {flag} {least_ms:g}"
    small = min(_misses(rows, "memory", floor), default=None)
    if small is not None and not served:
        yield f"{small[1]} needs the least memory: {small[0] / GIB:.1f} GiB"


def _misses(rows: Sequence[Considered], bound: str, floor: float) -> Iterator[tuple[float, str]]:
    """By how much each option breaks one bound, of those that surely keep the accuracy."""
    for row in rows:
        if (
            isinstance(row.capacity, TooMuch)
            and row.kept[0] >= floor
            and row.capacity.bound == bound
        ):
            yield row.capacity.least, row.option.name
