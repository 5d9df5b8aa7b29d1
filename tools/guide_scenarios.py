"""Three scenarios of docs/guide-tables.md, and how its tables are written."""

from __future__ import annotations

from collections.abc import Iterable

from secateur.advisor.advice import MONTH_HOURS, AdviceQuestion, Requirements
from secateur.advisor.capacity import GIB, Capacity, Load
from secateur.advisor.facts import Estimate, read_facts
from secateur.advisor.options import CompressionWay
from secateur.models.shape import ModelShape
from written_files import table

FACTS = read_facts()


def shape(name: str) -> ModelShape:
    """A well-known model."""
    return FACTS.shapes[name].shape(name)


def asked(model: str, hardware: str, load: Load, loss: float | None) -> AdviceQuestion:
    """What `secateur advise` would be asked."""
    device = FACTS.hardware[hardware]
    assert device.memory_gib is not None
    size = round(device.memory_gib * GIB)
    return AdviceQuestion(shape(model), device, size, FACTS, Requirements(load, loss))


CHATBOT = asked("llama-3.1-8b", "a100-80gb", Load(1e6, 400, 100, token_ms=50.0), 0.03)
EDGE = asked("llama-3.2-3b", "raspberry-pi-5", Load(200, 64, 64, token_ms=250.0), 0.03)
BATCH = asked("llama-3.1-70b", "h100-80gb", Load(1e6, 1500, 150, peak=1.0, utilisation=0.95), 0.03)


def ranged(value: Estimate, form: str = ",.0f") -> str:
    """A number with its range."""
    if value.low == value.high:
        return format(value.typical, form)
    return f"{value.typical:{form}} ({value.low:{form}} to {value.high:{form}})"


def billions(weights: float) -> str:
    """A count of weights."""
    return f"{weights / 1e9:.2f} B"


def scenarios() -> Iterable[str]:
    """Three scenarios, with the arithmetic."""
    yield "## Three scenarios"
    yield ""
    for title, question in (
        ("A chatbot on GPUs", CHATBOT),
        ("A device at the edge", EDGE),
        ("A batch of documents", BATCH),
    ):
        yield from scenario(title, question)


def scenario(title: str, question: AdviceQuestion) -> Iterable[str]:
    """One scenario: the question, the options, and the arithmetic of the chosen one."""
    load, model, advice = question.need.load, question.model, question.answer()
    bound = f", {load.token_ms:g} ms between two tokens" if load.token_ms else ""
    loss = question.need.quality_loss or 0.0
    yield f"### {title}"
    yield ""
    yield (
        f"{model.name} on {question.hardware.name}: {load.requests_per_day:,.0f} requests a day "
        f"of {load.prompt_tokens} + {load.new_tokens} tokens{bound}, at most {loss:.0%} of the "
        f"accuracy lost, busiest moment {load.peak:g} times the average, {load.utilisation:.0%} "
        "of the time planned."
    )
    yield ""
    yield f"**{advice.verdict}**"
    yield ""
    shown = [row for row in advice.considered if row.option.changed <= 1]
    rows = []
    for row in shown:
        found = row.capacity
        if isinstance(found, Capacity) and row.cost:
            rows.append((row.option.name, f"{found.memory.total / GIB:.1f} GiB", str(found.batch),
                         ranged(found.step * 1e3, ".1f"), ranged(found.devices),
                         ranged(row.cost.month), row.refused or "in"))  # fmt: skip
        else:
            rows.append((row.option.name, "", "", "", "", "", row.refused))
    columns = ("way", "memory of a copy", "sequences", "ms of a step", "devices", "USD a month", "")
    yield from table(columns, rows)
    chosen = advice.chosen
    if chosen is not None and isinstance(chosen.capacity, Capacity):
        yield from arithmetic(question, chosen.capacity, chosen.option)


def arithmetic(question: AdviceQuestion, found: Capacity, option: CompressionWay) -> Iterable[str]:
    """The numbers of an option, step by step."""
    load, cut = question.need.load, option.shape(question.model)
    memory, price = found.memory, question.hardware.usd_per_hour[1]
    yield f"By hand, for {option.name}:"
    yield ""
    linears = f"{billions(cut.linears)} · {option.bits:g} / 8"
    outer = f"{billions(cut.outer)} · {option.head_bits(cut):g} / 8"
    yield f"- weights: {linears} + {outer} = {memory.weights / GIB:.2f} GiB"
    cache = f"{found.batch} sequences · {load.context} tokens · {cut.cache_bytes(1):,.0f} bytes"
    yield f"- keys and values: {cache} = {memory.cache / GIB:.2f} GiB"
    yield (
        f"- memory of a copy: with {memory.working / GIB:.2f} GiB of work and "
        f"{memory.overhead / GIB:.2f} GiB of overhead {memory.total / GIB:.2f} GiB, on "
        f"{found.shared_by} x {question.memory_bytes / GIB:.1f} GiB"
    )
    busy, answer = (
        found.busy.typical,
        f"{load.new_tokens} · {found.step.typical:.4f} s / {found.batch}",
    )
    yield f"- a request: {found.first_token.typical:.4f} s for its prompt + {answer} = {busy:.4f} s"
    second = load.requests_per_day / 86400
    copies = f"{second:.4g} requests a second · {load.peak:g} · {busy:.4f} / {load.utilisation:g}"
    exact = second * load.peak * busy / load.utilisation
    many = f"{found.replicas}, each on {found.shared_by} devices"
    yield f"- copies: {copies} = {exact:.2f}, so {many}"
    month = found.devices.typical * price * MONTH_HOURS
    hours = f"{found.devices.typical:.0f} · {price:g} USD · {MONTH_HOURS:g} h"
    yield f"- a month: {hours} = {month:,.2f} USD"
    yield ""
