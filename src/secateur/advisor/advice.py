"""Compares the ways on one device and decides: leave the model, quantize, prune, both, or distil.

A way is *safe* if even its lowest published accuracy keeps the bound, *possible* if its highest
does. Among the safe ones the one that takes the device least time for a token wins; if several take
the same, the one that changes least. Possible ones that take less are named: measure their loss.

    busy      = prompt(P) + N · step(b) / b        device seconds of a request, P tokens in, N out
    P50       = prompt(P) + N · step(b)            seconds until it is answered, without waiting
    tokens    = price of an hour · busy / 3600 / (P + N) · 1,000,000           USD of a million
    prune     = seconds of a 7B model · parameters / 7 billion     ALPS, the longest of the one-shot
                methods, for each step; one pass without a text (FP8, Q8_0): magnitude pruning
    learn     = (6 · student + 2 · teacher) · tokens / (peak · e)  operations of a training step

The batch b is the power of two with the least busy time whose memory fits and whose step keeps the
bound, unless it is given.

    weights   = linears · bits / 8 + ends · head_bits / 8 + other · 2

`secateur.models.shape` adds the cache and the working memory. A token and a prompt take the time
that kernels were measured to take, or that of the roofline of a data sheet (Williams et al., CACM
2009), for a batch of b sequences with T tokens of context:

    bytes(b)  = weights that are read · bits / 8 + b · cache that is read
    step(b)   = max(bytes / (bandwidth · e_b), operations / (peak · e_c)) + layers · overhead
    prompt(P) = operations of a prompt / (peak · e_c), but never less than a step

Of a mixture with E experts and k for each token, b tokens read E · (1 − (1 − k / E)^b) experts of a
layer, if the router spreads them evenly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from secateur.advisor.facts import Efficiency, Estimate, Facts, Hardware
from secateur.advisor.options import CompressionWay, options_for
from secateur.models.shape import ModelShape, ServingMemory, memory_with

GIB = 2**30
BATCHES = tuple(2**n for n in range(10))

PRUNING_DEVICE = "a100-80gb"
"""On it the times of methods were published."""

LEAST_SAVING = 0.05
"""A change that saves less than this part of the time is not worth its risk."""


def weights_read(model: ModelShape, batch: int) -> float:
    """Weights of the linears that a step reads: of a mixture, the experts that are hit."""
    if not model.experts:
        return model.linears
    dense = model.linears - model.expert_weights
    # k / E: the share of the experts that one token reads
    share = (model.active - dense) / model.expert_weights
    return dense + model.expert_weights * (1 - (1 - share) ** batch)


@dataclass(frozen=True)
class Roofline:
    """Times from a data sheet.

    Attributes:
        device: its bandwidth and peak.
        efficiency: what engines reach of them.
    """

    device: Hardware
    efficiency: Efficiency

    def step(self, model: ModelShape, way: CompressionWay, batch: int, context: int) -> Estimate:
        """Seconds until every sequence of a batch has one more token.

        Args:
            model: already cut.
            way: how it is stored.
            batch: sequences.
            context: tokens of each so far.
        """
        measured = way.zeros.decode  # where there is no published gain, the bytes decide
        gains = measured or Estimate(1.0, 1.0, 1.0)
        bits = way.values.bits if measured else way.bits
        linears = weights_read(model, batch) * bits / 8
        rest = model.head * way.head_bits(model) / 8 + batch * model.cache_read_bytes(context)
        computing = self.computing(way, batch * model.step_operations(context))
        # from quick to slow: the largest gain goes with the quickest engine
        reached, bandwidth = self.efficiency.from_quick_to_slow(), self.device.bandwidth_gb_s or 0
        return Estimate(*(
            max((linears / gain + rest) / (bandwidth * 1e9 * share), seconds)
            + overhead * model.layers
            for (share, _, overhead), gain, seconds in zip(
                reached, reversed(gains), computing, strict=True
            )
        ))  # fmt: skip

    def prompt(self, model: ModelShape, way: CompressionWay, tokens: int) -> Estimate:
        """Seconds to process a prompt: all tokens at once, but never faster than one step."""
        computing = self.computing(way, model.prompt_operations(tokens))
        return Estimate(*map(max, computing, self.step(model, way, 1, 0)))

    def computing(self, way: CompressionWay, operations: float) -> Iterator[float]:
        """Seconds for floating-point or integer operations, from quick to slow."""
        peak = self.device.tflops.get(way.values.product, self.device.tflops["bf16"]) * 1e12
        reached = self.efficiency.from_quick_to_slow()
        return (operations / (peak * share) for _, share, _ in reached)


@dataclass(frozen=True)
class Measured:
    """Times of models with random weights that were decoded on this machine.

    Attributes:
        model: the sizes that were timed.
        times: of each way to store it, by `CompressionWay.stored`: seconds of a token outside the
            decoder layers, of one in them, and of one of a prompt.
        spread: how far off a prediction may be, as a fraction.
    """

    model: ModelShape
    times: Mapping[str, tuple[float, float, float]]
    spread: float = 0.15

    def step(self, model: ModelShape, way: CompressionWay, batch: int, context: int) -> Estimate:
        """Sequences decode one after the other; a cut model's layers take as much less time."""
        ends, layers, _ = self.times[way.stored]
        return self.around(batch * (ends + layers * model.active / self.model.active))

    def prompt(self, model: ModelShape, way: CompressionWay, tokens: int) -> Estimate:
        """Every token takes the same time."""
        return self.around(tokens * self.times[way.stored][2] * model.active / self.model.active)

    def around(self, seconds: float) -> Estimate:
        """A range around a measured time."""
        return Estimate(seconds * (1 - self.spread), seconds, seconds * (1 + self.spread))


def weight_bytes(model: ModelShape, way: CompressionWay) -> int:
    """Bytes of the weights of a model that was already cut.

    The embedding is stored once; a tied head shares it.
    """
    linears = model.linears * way.bits / 8
    return round(linears + model.outer * way.head_bits(model) / 8 + model.other * 2)


@dataclass(frozen=True)
class AdviceQuestion:
    """Everything that an advice depends on.

    Attributes:
        model: the sizes, not cut.
        hardware: what it runs on.
        memory_bytes: of the device.
        facts: efficiency, prices, published losses.
        speed: predicts times.
        prompt_tokens: of a request.
        new_tokens: of its answer.
        batch: sequences at once; None for as many as pay.
        token_ms: the most milliseconds between two tokens of an answer; None for any.
        quality_loss: the fraction of the accuracy that may go.
        gpu_hours: the most for making the model.
    """

    model: ModelShape
    hardware: Hardware
    memory_bytes: int
    facts: Facts
    speed: Roofline | Measured
    prompt_tokens: int
    new_tokens: int
    batch: int | None = None
    token_ms: float | None = None
    quality_loss: float = 0.01
    gpu_hours: float = 24.0

    @property
    def context(self) -> int:
        """Tokens of a request and its answer."""
        return self.prompt_tokens + self.new_tokens

    @property
    def batches(self) -> Sequence[int]:
        """The batches to try, the smallest first; our kernels decode one sequence at a time."""
        if self.batch is not None:
            return (self.batch,)
        return BATCHES[:1] if self.hardware.kind == "cpu" else BATCHES


@dataclass(frozen=True)
class Served:
    """One way at work on the device.

    Attributes:
        batch: sequences at once.
        memory: of all of them.
        step: seconds of a step: of one token of each sequence.
        first_token: seconds to process a prompt.
        request: seconds of a whole request, without waiting: the median, P50.
        busy: seconds of the device for one request.
        usd: for a million tokens of prompt and answer; None where no price is known.
    """

    batch: int
    memory: ServingMemory
    step: Estimate
    first_token: Estimate
    request: Estimate
    busy: Estimate
    usd: Estimate | None


def served(asked: AdviceQuestion, way: CompressionWay) -> Served | str:
    """How a way works on the device, or why it cannot."""
    shape, kind = way.shape(asked.model), asked.hardware.kind
    context, weights = asked.context, weight_bytes(shape, way)
    memory = {b: memory_with(weights, shape, kind, b, context) for b in asked.batches}
    fits = [b for b, found in memory.items() if found.total <= asked.memory_bytes]
    if not fits:
        least = memory[asked.batches[0]].total / GIB
        return f"needs {least:.1f} GiB, {asked.memory_bytes / GIB:.1f} GiB are there"
    steps = {b: asked.speed.step(shape, way, b, context) for b in fits}
    quick = [b for b in fits if asked.token_ms is None or 1e3 * steps[b].typical <= asked.token_ms]
    if not quick:
        return f"{1e3 * steps[fits[0]].typical:.3g} ms for a token, {asked.token_ms:g} allowed"
    first, price = asked.speed.prompt(shape, way, asked.prompt_tokens), asked.hardware.usd_per_hour

    def busy(batch: int) -> Estimate:
        pairs = zip(first, steps[batch], strict=True)
        return Estimate(*(prompt + asked.new_tokens * step / batch for prompt, step in pairs))

    best = min(quick, key=lambda b: busy(b).typical)
    # a request waits for whole steps; the device shares each among the batch
    request = (p + asked.new_tokens * s for p, s in zip(first, steps[best], strict=True))
    usd = None
    if price is not None:
        hours = (seconds / 3600 for seconds in busy(best))
        usd = Estimate(*(1e6 / context * a * b for a, b in zip(price, hours, strict=True)))
    return Served(best, memory[best], steps[best], first, Estimate(*request), busy(best), usd)


def making_of(
    model: ModelShape, way: CompressionWay, facts: Facts
) -> tuple[Estimate, Estimate, str]:
    """What it takes to make a way: pruning or cutting, rounding, distillation.

    Returns:
        Hours of the device that the formula names, USD at its typical price, and the formula.
    """
    device, steps = facts.hardware[PRUNING_DEVICE], [part.takes for part in way.changes]
    seconds = sum(facts.pruning_seconds_of_7b[step] for step in steps) * model.parameters / 7e9
    names = " and ".join(name if n == 1 else f"{n} x {name}" for name, n in Counter(steps).items())
    formula = f"as long as pruning with {names} on one {device.name}, by published times"
    # forward and backward of the student take 6 operations a weight, the teacher's forward 2
    operations, tokens = 6 * way.shape(model).per_token + 2 * model.per_token, way.structure.tokens
    learning = (
        operations * tokens / (device.tflops["bf16"] * 1e12 * share)
        for share in reversed(facts.training_compute)
    )
    hours = Estimate(*((seconds + more) / 3600 for more in learning))
    if tokens:
        formula += f"; distillation on {tokens / 1e9:g} billion tokens"
    price = device.usd_per_hour[1] if device.usd_per_hour else 0.0
    usd = Estimate(*(price * each for each in hours))
    return hours, usd, formula if steps else "nothing to make"


@dataclass(frozen=True)
class Considered:
    """One way, computed.

    Attributes:
        option: the way.
        kept: the fraction of the accuracy that stays, published: low, high.
        served: how it works on the device; None if it cannot.
        gpu_hours: to make it, of the device that `formula` names.
        usd: to make it, at the typical price of that device.
        formula: how the hours were found.
        refused: why it is out: accuracy, hours, memory or time; empty if it is in.
        safe: whether even the lowest published accuracy keeps the bound.
    """

    option: CompressionWay
    kept: tuple[float, float]
    served: Served | None
    gpu_hours: Estimate
    usd: Estimate
    formula: str
    refused: str
    safe: bool

    @property
    def seconds(self) -> float:
        """Device seconds of a request, typical; infinite if it cannot be served."""
        return self.served.busy.typical if self.served else float("inf")


def advise_on(
    asked: AdviceQuestion,
) -> tuple[tuple[Considered, ...], Considered | None, tuple[Considered, ...]]:
    """Compute every way and decide: the quickest safe one, or the model if it is hardly slower.

    Returns:
        All ways, the quickest first and those that are out last; the one to take, None if none can
        be taken; and those that take less time and may keep the bound: measure them.
    """
    ways = (_considered(asked, option) for option in options_for(asked.model, asked.hardware))
    # the quickest first, then the least changed, then what surely keeps more
    rows = sorted(
        ways, key=lambda x: (bool(x.refused), x.seconds, len(x.option.changes), -x.kept[0])
    )
    inside = [row for row in rows if not row.refused]
    safe = [row for row in inside if row.safe]
    whole = next((row for row in safe if not row.option.changes), None)
    chosen = safe[0] if safe else None
    if chosen and whole and chosen.seconds > (1 - LEAST_SAVING) * whole.seconds:
        chosen = whole
    most = chosen.seconds if chosen else float("inf")
    cheaper = tuple(row for row in inside if not row.safe and row.seconds < most)
    return tuple(rows), chosen, cheaper


def _considered(asked: AdviceQuestion, option: CompressionWay) -> Considered:
    """Compute one way."""
    kept, made = option.kept(asked.facts), making_of(asked.model, option, asked.facts)
    found, floor, refused = served(asked, option), 1 - asked.quality_loss, ""
    if isinstance(found, str):
        refused = found
    elif kept[1] < floor:
        refused = f"keeps {kept[0]:.1%} to {kept[1]:.1%} of the accuracy, {floor:.1%} required"
    elif (hours := made[0].typical) > asked.gpu_hours:
        refused = f"takes {hours:,.0f} GPU hours to make, {asked.gpu_hours:g} allowed"
    works = None if isinstance(found, str) else found
    return Considered(option, kept, works, *made, refused, kept[0] >= floor)


def verdict_on(chosen: Considered | None, cheaper: Sequence[Considered]) -> str:
    """What to do, in one or two sentences."""
    may = "would be quicker and may meet your limits: measure its loss."
    hint = f" {cheaper[0].option.name} {may}" if cheaper else ""
    if chosen is None:
        return f"No way is certain to keep your limits on this device.{hint}"
    option = chosen.option
    if not option.changes:
        return f"Leave the model as it is: nothing quicker is certain to meet your limits.{hint}"
    if option.changes == [option.values]:
        return f"Only quantize: {option.name}.{hint}"
    verb = "Distill" if option.structure.tokens else "Prune"
    verb += " and quantize" if option.values.takes else ""
    return f"{verb}: {option.name}.{hint}"
