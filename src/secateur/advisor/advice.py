"""Compares the options under a load and decides: leave it, quantize, prune, both, or distill.

An option is *safe* if even its lowest published accuracy keeps the bound, *possible* if its highest
does. Among the safe ones the cheapest over three years wins, made and served; if several cost the
same, the one that changes least. Possible ones are named with the advice to measure.

A device costs the same however little it serves. For a load that needs less than half of one, the
verdict begins with that, and names the hosted model and the other device that would cost less.

When nothing serves a load within its bounds, the advice names those that would have to be looser.

Serving and making the model cost

    month  = devices · price · 730 h           year = devices · price · 8760 h
    tokens = month / (requests per day · 30.42 · tokens of a request) · 1,000,000
    total  = month · 36 + price of making
    API    = requests per month · (P · input + N · output) / 1,000,000
    prune  = seconds of a 7B model · parameters / 7 billion     ALPS, the longest of the one-shot
             methods, for each step; one pass without a text (FP8, Q8_0): magnitude pruning
    learn  = (6 · student + 2 · teacher) · tokens / (peak · e)     operations of a training step

A `AdviceQuestion` is everything that an advice depends on, as data: the same question has the same
answer. `secateur advise` writes it with the answer, so `secateur report` computes the answer again
and the what-if page can vary it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from secateur.advisor.capacity import (
    BATCHES,
    GIB,
    SHARED_BY,
    Capacity,
    Load,
    Measured,
    Roofline,
    ServingDevice,
    TimeModel,
    TokenTimes,
    TooMuch,
    capacity_of,
    most_requests,
)
from secateur.advisor.facts import API, LIFE_HOURS, Estimate, Facts, Hardware
from secateur.advisor.options import ENGINES, CompressionWay, options_for
from secateur.models.shape import LayerCache, LayerKind, ModelShape

MONTH_HOURS, YEAR_HOURS, MONTH_DAYS = 730.0, 8760.0, 730.0 / 24
LIFE_MONTHS = LIFE_HOURS / MONTH_HOURS

PRUNING_DEVICE = "a100-80gb"
"""On it the times of methods were published."""


@dataclass(frozen=True)
class ServingCost:
    """What serving costs, in USD.

    Attributes:
        month: of all devices.
        year: of all devices.
        million_tokens: prompt and answer tokens together.
    """

    month: Estimate
    year: Estimate
    million_tokens: Estimate


@dataclass(frozen=True)
class Making:
    """What it costs to make a model once.

    Attributes:
        gpu_hours: of the device that its formula names.
        usd: at the price of that device.
        formula: how the hours were found.
    """

    gpu_hours: Estimate
    usd: Estimate
    formula: str


@dataclass(frozen=True)
class APICost:
    """A hosted model under the same load.

    Attributes:
        name: of the model.
        month: USD.
        requests_per_day: from which serving one copy oneself is cheaper; None if never.
    """

    name: str
    month: float
    requests_per_day: float | None


def cost_of(found: Capacity, load: Load, price: Estimate) -> ServingCost:
    """What serving costs. Low joins few devices with a low price, high many with a high one."""
    hour = found.devices.times(price)
    tokens = load.requests_per_day * MONTH_DAYS * load.context
    month = hour * MONTH_HOURS
    return ServingCost(month, hour * YEAR_HOURS, month * (1e6 / tokens))


def making_of(model: ModelShape, option: CompressionWay, facts: Facts) -> Making:
    """What it costs to make an option: pruning or cutting, rounding, distillation."""
    device = facts.hardware[PRUNING_DEVICE]
    steps = [part.takes for part in option.parts if part.takes]
    seconds = sum(facts.pruning_seconds_of_7b[step] for step in steps) * model.parameters / 7e9
    hours = Estimate.exact(seconds / 3600)
    each = (name if n == 1 else f"{n} x {name}" for name, n in Counter(steps).items())
    took = f"as long as pruning with {' and '.join(each)} on one {device.name}, published"
    formula = f"{took} for 7 B, by parameters" if steps else "nothing to make"
    if option.structure.tokens:
        student = option.shape(model)
        operations = 6 * student.per_token + 2 * model.per_token
        hours = hours + learning_hours(operations, option.structure.tokens, device, facts)
        formula += f"; distillation on {option.structure.tokens / 1e9:g} billion tokens"
    usd = hours.times(facts.price(device))
    return Making(hours, usd, formula)


def learning_hours(operations: float, tokens: float, device: Hardware, facts: Facts) -> Estimate:
    """Hours of one GPU to train: operations per token · tokens / (peak · e) / 3600.

    Args:
        operations: of a token; 6 for each weight that learns, 2 for each that only predicts.
        tokens: in all.
        device: its peak in bfloat16.
        facts: the fraction of the peak that training reaches.
    """
    work = operations * tokens
    reached = Estimate(*facts.training_compute)
    return reached.map(lambda e: work / (device.tflops["bf16"] * 1e12 * e) / 3600)


def api_cost(name: str, api: API, found: Capacity, load: Load, price: Estimate) -> APICost:
    """A hosted model, and from how many requests on serving is cheaper.

    One copy costs the same however little it serves, so below some load the API is cheaper. If a
    copy at its limit still costs more for a request, serving never is.
    """
    request = (load.prompt_tokens * api.input + load.new_tokens * api.output) / 1e6
    copy = found.shared_by * price.typical * 24
    most = most_requests(found.least_busy.typical, load)
    least = copy / request if request else float("inf")
    return APICost(
        name, request * load.requests_per_day * MONTH_DAYS, least if least <= most else None
    )


def break_even_months(making: Making, before: ServingCost, after: ServingCost) -> float | None:
    """Months until the saved money has paid for the making; None if nothing is saved."""
    saved = before.month.typical - after.month.typical
    return making.usd.typical / saved if saved > 0 else None


LEAST_SAVING = 0.05
"""A change that saves less than this part of the cost is not worth its risk."""

FILLED = 0.5
"""A load that needs less than this part of one device does not fill it."""

LEAST_USD = 10.0
"""USD a month below which another place to serve is not worth a word."""


@dataclass(frozen=True)
class Requirements:
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

    @property
    def month(self) -> float:
        """USD a month, typical; infinite if it cannot serve."""
        return self.cost.month.typical if self.cost else math.inf

    @property
    def total(self) -> float:
        """USD to make it and to serve it for three years, typical; infinite if it cannot serve."""
        return self.month * LIFE_MONTHS + self.making.usd.typical


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


def advise_on(question: AdviceQuestion, others: Sequence[AdviceQuestion] = ()) -> Advice:
    """Compute every option and decide.

    Args:
        question: the model, the device, the load and the bounds.
        others: about devices to name instead, if the load does not fill this one.
    """
    hardware, need, facts = question.hardware, question.need, question.facts
    price, rows = facts.price(hardware), considered(question)
    base = next(row for row in rows if row.option.changed == 0)
    safe = [row for row in rows if row.possible and row.safe]
    chosen = _choose(safe, base)
    dearest = chosen.month if chosen else math.inf
    most = chosen.total if chosen else math.inf
    cheaper = tuple(x for x in rows if x.possible and not x.safe and x.total < most)
    apis: tuple[APICost, ...] = ()
    filled, alone = 1.0, False
    if chosen is not None and isinstance(chosen.capacity, Capacity):
        apis = tuple(
            api_cost(name, api, chosen.capacity, need.load, price)
            for name, api in facts.apis.items()
        )
        filled, alone = chosen.capacity.used(need.load), chosen.capacity.replicas == 1
    hosted = min(apis, key=lambda api: api.month, default=None)
    if hosted is not None and hosted.month > dearest - LEAST_USD:
        hosted = None
    empty = filled < FILLED and alone
    elsewhere = _cheapest(others) if empty else None
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
        question.model, hardware, tuple(rows), chosen, cheaper, apis, filled, hosted, elsewhere,
        months, verdict,
    )  # fmt: skip


def considered(question: AdviceQuestion) -> list[Considered]:
    """All options on a device, those that can serve first, the cheapest first."""
    options = options_for(question.model, question.hardware)
    return sorted((_consider(question, option) for option in options), key=_order)


def _cheapest(questions: Sequence[AdviceQuestion]) -> Elsewhere | None:
    """The cheapest way to serve a load on other devices that surely keeps the bounds, if any.

    One device costs the least that a way on it can cost, so dear ones need no computation.
    """
    found: list[Elsewhere] = []
    for question in sorted(questions, key=lambda one: one.hardware.usd_per_hour[1]):
        least = question.hardware.usd_per_hour[1] * MONTH_HOURS
        if found and least > min(one.month for one in found):
            break
        rows = considered(question)
        row = next((row for row in rows if row.possible and row.safe), None)
        if row is not None and isinstance(row.capacity, Capacity):
            many, step = round(row.capacity.devices.typical), row.capacity.step.typical
            found.append(Elsewhere(question.hardware.name, many, row.option.name, row.month, step))
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
    choices = [] if hosted is None else [f"a hosted model ({_priced(hosted.name, hosted.month)})"]
    if elsewhere is not None:
        name = _several(elsewhere.devices, elsewhere.device)
        name += "" if elsewhere.option == "as it is" else f", {elsewhere.option}"
        speed = f"{1e3 * elsewhere.step:.0f} ms/token"
        choices.append(f"smaller hardware ({_priced(name, elsewhere.month)}, {speed})")
    return (
        "This load does not fill a device: it needs "
        f"{share} of {_several(chosen.capacity.shared_by, device.name, 'one ')}. "
        f"Use {' or '.join(choices)}."
    )


def _several(count: int, name: str, one: str = "") -> str:
    """A device, or how many of it; `one` stands before a single one."""
    return f"{one}{name}" if count == 1 else f"{count} x {name}"


def _priced(name: str, month: float) -> str:
    """A name and a price for people."""
    return f"{name}: {month:,.0f} USD a month" if month >= 1 else f"{name}: under 1 USD a month"


def _consider(question: AdviceQuestion, option: CompressionWay) -> Considered:
    """Compute one option."""
    model, facts, need = question.model, question.facts, question.need
    kept, making = option.kept(facts), making_of(model, option, facts)
    found, cost = capacity_of(model, option, question.device, need.load), None
    if isinstance(found, Capacity):
        cost = cost_of(found, need.load, facts.price(question.hardware))
    floor = 0.0 if need.quality_loss is None else 1 - need.quality_loss
    refused = ""
    if isinstance(found, TooMuch):
        refused = found.reason
    elif kept[1] < floor:
        refused = f"keeps {kept[0]:.1%} to {kept[1]:.1%} of the accuracy, {floor:.1%} required"
    elif need.gpu_hours is not None and (hours := making.gpu_hours.typical) > need.gpu_hours:
        refused = f"takes {hours:,.0f} GPU hours to make, {need.gpu_hours:g} allowed"
    return Considered(option, kept, found, cost, making, refused, kept[0] >= floor)


def _order(row: Considered) -> tuple[bool, float, int, float]:
    """Cheapest first, then the least changed, then what surely keeps more; those out last."""
    return bool(row.refused), row.total, row.option.changed, -row.kept[0]


def _choose(safe: Sequence[Considered], base: Considered) -> Considered | None:
    """The cheapest safe option; the model itself if it costs hardly more."""
    best = next(iter(safe), None)
    if best is not None and base in safe and best.total > (1 - LEAST_SAVING) * base.total:
        return base
    return best


def _verdict_on(chosen: Considered | None, cheaper: Sequence[Considered]) -> str:
    """One sentence for people."""
    may = "would be cheaper and may meet your limits: measure its loss."
    hint = f" {cheaper[0].option.name} {may}" if cheaper else ""
    if chosen is None:
        return f"No option is certain to serve this load within your limits.{hint}"
    if chosen.option.changed == 0:
        return f"Leave the model as it is: no cheaper option is certain to meet your limits.{hint}"
    option = chosen.option
    only = option.structure.name == "whole" and option.zeros.name == "dense"
    verb = "Only quantize" if only else "Distill" if option.structure.tokens else "Prune"
    if not only and option.values.name != "bf16":
        verb += " and quantize"
    if option.structure.tokens:
        verb += f" for {chosen.making.usd.typical:,.0f} USD once"
    return f"{verb}: {option.name}.{hint}"


def nearest(rows: Sequence[Considered], need: Requirements) -> Iterator[str]:
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
        lack = row.capacity
        if isinstance(lack, TooMuch) and row.kept[0] >= floor and lack.bound == bound:
            yield lack.least, row.option.name


@dataclass(frozen=True)
class AdviceQuestion:
    """A model, a device and a need.

    Attributes:
        model: the sizes, not cut.
        hardware: what it runs on, with its price.
        memory_bytes: of one device.
        facts: efficiency, prices, published losses.
        need: the load and the bounds.
        times: measured on this machine, by the name of each option; None for the roofline.
    """

    model: ModelShape
    hardware: Hardware
    memory_bytes: int
    facts: Facts
    need: Requirements
    times: Mapping[str, TokenTimes] | None = None

    @property
    def device(self) -> ServingDevice:
        """The memory of the device and its time model."""
        kind = self.hardware.kind
        engine = ENGINES[kind]
        most, batch = SHARED_BY[-1] if engine.shared else 1, BATCHES[-1] if engine.batched else 1
        return ServingDevice(kind, self.memory_bytes, self.speed, most, batch)

    def speed(self, devices: int) -> TimeModel:
        """The times when so many devices share a model."""
        if self.times is not None:
            return Measured(self.model, self.times)
        return Roofline(self.hardware, self.facts.efficiency[self.hardware.kind], devices)

    def answer(self) -> Advice:
        """The advice."""
        return advise_on(self, self.others())

    def others(self) -> list[AdviceQuestion]:
        """The same question about all other devices with a data sheet, rented or owned as this."""
        mine, known = self.hardware, self.facts.hardware.values()
        alike = (x for x in known if (x.bought is None) == (mine.bought is None))
        return [self.on(x) for x in alike if x.on_paper and x.name != mine.name]

    def on(self, other: Hardware) -> AdviceQuestion:
        """The same question about another device, by its data sheet."""
        size = round((other.memory_gib or 0) * 2**30)
        return replace(self, hardware=other, memory_bytes=size, times=None)

    def with_need(self, **changes: Any) -> AdviceQuestion:
        """The same question with another load or other bounds.

        Args:
            **changes: fields of `Requirements` or of `Load`.
        """
        bounds = {name: value for name, value in changes.items() if name in BOUNDS}
        load = {name: value for name, value in changes.items() if name not in BOUNDS}
        need = replace(self.need, load=replace(self.need.load, **load), **bounds)
        return replace(self, need=need)

    def to_json(self) -> dict[str, Any]:
        """The question as one JSON object."""
        return {
            "model": asdict(self.model),
            "hardware": self.hardware.model_dump(mode="json"),
            "memory_bytes": self.memory_bytes,
            "facts": self.facts.model_dump(mode="json"),
            "need": asdict(self.need),
            "times": self.times and {name: asdict(one) for name, one in self.times.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AdviceQuestion:
        """The question that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is no such object.
        """
        times, need = record["times"], record["need"]
        kinds = tuple(
            LayerKind(kind["layers"], LayerCache(**kind["cache"]))
            for kind in record["model"]["kinds"]
        )
        return cls(
            ModelShape(**{**record["model"], "kinds": kinds}),
            Hardware.model_validate(record["hardware"]),
            int(record["memory_bytes"]),
            Facts.model_validate(record["facts"]),
            Requirements(**{**need, "load": Load(**need["load"])}),
            times and {name: TokenTimes(**one) for name, one in times.items()},
        )


BOUNDS = ("quality_loss", "gpu_hours")
