"""Compares the options under a load and decides: leave it, quantize, prune, both, or distill.

An option is *safe* if even its lowest published accuracy keeps the bound, *possible* if its highest
does. Among the safe ones the cheapest to serve wins; if several cost the
same, the one that changes least. Possible ones are named with the advice to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.advisor.capacity import Capacity, Load, ServingDevice, TooMuch, capacity_of
from secateur.advisor.estimate import Estimate
from secateur.advisor.facts import Facts, Hardware
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

__all__ = ["Advice", "Considered", "Need", "advise_on"]

LEAST_SAVING = 0.05
"""A change that saves less than this part of the cost is not worth its risk."""


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
class Advice:
    """The decision.

    Attributes:
        model: the sizes.
        device: what it was computed for.
        considered: all options, in order of cost; those that are out come last.
        chosen: the option to take; None if none can serve.
        cheaper: options that cost less and may keep the bound: measure them.
        apis: hosted models under the same load, beside the chosen option.
        paid_back_months: until the saved money has paid for the making; None if none is saved.
        verdict: one sentence.
    """

    model: ModelShape
    device: Hardware
    considered: tuple[Considered, ...]
    chosen: Considered | None
    cheaper: tuple[Considered, ...]
    apis: tuple[APICost, ...]
    paid_back_months: float | None
    verdict: str


def advise_on(
    model: ModelShape, hardware: Hardware, device: ServingDevice, facts: Facts, need: Need
) -> Advice:
    """Compute every option and decide.

    Args:
        model: its sizes.
        hardware: what it runs on, with its price.
        device: its memory and speed.
        facts: prices and published losses.
        need: the load and the bounds.
    """
    price = facts.price(hardware)
    options = list(options_for(model, hardware))
    rows = [consider(model, option, device, facts, need, price) for option in options]
    rows.sort(key=order)
    base = next(row for row in rows if row.option.changed == 0)
    safe = [row for row in rows if row.possible and row.safe]
    chosen = choose(safe, base)
    dearest = chosen.cost.month.typical if chosen and chosen.cost else float("inf")
    cheaper = tuple(
        row for row in rows
        if row.possible and not row.safe and row.cost and row.cost.month.typical < dearest
    )  # fmt: skip
    apis: tuple[APICost, ...] = ()
    if chosen is not None and isinstance(chosen.capacity, Capacity):
        apis = tuple(
            api_cost(name, api, chosen.capacity, need.load, price)
            for name, api in facts.apis.items()
        )
    months = None
    if chosen is not None and chosen.cost is not None and base.cost is not None:
        months = break_even_months(chosen.making, base.cost, chosen.cost)
    verdict = verdict_on(chosen, cheaper)
    return Advice(model, hardware, tuple(rows), chosen, cheaper, apis, months, verdict)


def consider(
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
        refused = f"keeps {kept[0]:.1%} to {kept[1]:.1%} of the accuracy, {floor:.1%} asked"
    elif need.gpu_hours is not None and making.gpu_hours.typical > need.gpu_hours:
        refused = (
            f"takes {making.gpu_hours.typical:,.0f} GPU hours to make, {need.gpu_hours:g} allowed"
        )
    return Considered(option, kept, found, cost, making, refused, kept[0] >= floor)


def order(row: Considered) -> tuple[bool, float, int, float]:
    """Cheapest first, then the least changed, then what surely keeps more; those out last."""
    month = row.cost.month.typical if row.cost else float("inf")
    return bool(row.refused), month, row.option.changed, -row.kept[0]


def choose(safe: Sequence[Considered], base: Considered) -> Considered | None:
    """The cheapest safe option; the model itself if it costs hardly more."""
    if not safe:
        return None
    best = safe[0]
    if base in safe and base.cost and best.cost:
        least = (1 - LEAST_SAVING) * base.cost.month.typical
        if best.cost.month.typical > least:
            return base
    return best


def verdict_on(chosen: Considered | None, cheaper: Sequence[Considered]) -> str:
    """One sentence for people."""
    hint = (
        f" {cheaper[0].option.name} would be cheaper, and its published loss may keep the bound: "
        "measure it."
        if cheaper
        else ""
    )
    if chosen is None:
        return f"Nothing is sure to serve this load within the bounds.{hint}"
    if chosen.option.changed == 0:
        return f"Leave the model as it is: nothing that surely keeps the bounds is cheaper.{hint}"
    option = chosen.option
    only = option.structure.name == "whole" and option.zeros.name == "dense"
    verb = "Only quantize" if only else "Distill" if option.structure.tokens else "Prune"
    if not only and option.values.name != "bf16":
        verb += " and quantize"
    return f"{verb}: {option.name}.{hint}"
