"""What it costs: devices by the hour, tokens by the million, and the making of the model.

month  = devices · price · 730 h           year = devices · price · 8760 h
tokens = month / (requests per day · 30.42 · tokens of a request) · 1,000,000
API    = requests per month · (P · input + N · output) / 1,000,000
prune  = seconds of a 7B model · parameters / 7 billion
learn  = (6 · student + 2 · teacher) · tokens / (peak · e)     operations of a training step
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.advisor.capacity import Capacity, Load, most_requests
from secateur.advisor.facts import API, Estimate, Facts, Hardware
from secateur.advisor.options import CompressionWay
from secateur.advisor.shape import ModelShape

MONTH_HOURS, YEAR_HOURS, MONTH_DAYS = 730.0, 8760.0, 730.0 / 24

PRUNING_METHOD = "alps"
"""Its published time is the longest of the one-shot methods; the presets are near it."""

PRUNING_DEVICE = "a100-80gb"


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
    parts = (option.structure, option.zeros, option.values)
    passes = sum("".join(part.commands).startswith("secateur") for part in parts)  # FP8 needs none
    seconds = facts.pruning_seconds_of_7b[PRUNING_METHOD] * model.parameters / 7e9 * passes
    hours = Estimate.exact(seconds / 3600)
    formula = f"{passes} x {PRUNING_METHOD} on one {device.name}, published time, by parameters"
    if option.structure.tokens:
        student = option.shape(model)
        operations = 6 * student.per_token + 2 * model.per_token
        hours = hours + learning_hours(operations, option.structure.tokens, device, facts)
        formula += f"; distillation on {option.structure.tokens / 1e9:g} billion tokens"
    usd = hours.times(facts.price(device))
    return Making(hours, usd, formula if passes else "nothing to make")


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
        name,
        request * load.requests_per_day * MONTH_DAYS,
        least if least <= most else None,
    )


def break_even_months(making: Making, before: ServingCost, after: ServingCost) -> float | None:
    """Months until the saved money has paid for the making; None if nothing is saved."""
    saved = before.month.typical - after.month.typical
    return making.usd.typical / saved if saved > 0 else None
