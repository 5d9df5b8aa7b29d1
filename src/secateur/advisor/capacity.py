"""How many devices a load needs: the batch that fits and is quick enough, then the replicas.

    p99(b)      = step(b) + prompt(min(P, chunk))     a step that also reads a chunk of a prompt;
                  step(1) where b = 1: nobody else's prompt is read meanwhile
    busy(b)     = prompt(P) + N · step(b) / b           device seconds of a request, P in, N out
    replicas    = ceil(requests per second at the peak · busy / utilisation)

The devices are counted with the power of two with the least busy(b) whose memory fits and whose p99
keeps the bound. The batch is the smallest that needs no more copies, at none of the times: as many
sequences as this load has at once. As many devices share a copy of the model as makes the sum of
devices least: more of them leave more memory for a larger batch.

Serving takes this memory:

    weights  = linears · bits / 8 + ends · head_bits / 8 + other · 2
    KV cache = batch · Σ layers of a kind · (min(context, window) · values · 2 + state); on a CPU
               `secateur.models.shape.held_positions` in place of min(context, window)
    working  = chunk · (4 · hidden + 2 · largest) · 2 + batch · vocabulary · 4
    total    = (weights + KV cache + working) · (1 + FRAGMENTATION) + RUNTIME

`values` are keys and values of a token, in bfloat16, or the latent vector of latent attention. A
layer without a window keeps them of all tokens, a recurrent layer has a state instead, and a layer
that reads the cache of another keeps nothing (`secateur.models.shape`). `largest` is the
width of attention or of the whole residual stream, `chunk` the tokens of a prompt that are
processed together.

A token and a prompt take the time that kernels were measured to take, or that of the roofline of
a data sheet (Williams et al., CACM 2009), for a batch of b sequences with T tokens of context:

    bytes(b)   = weights that are read · bits / 8 + b · cache that is read
    flops(b)   = b · (2 · per_token + Σ layers of a kind · (2 · min(T, window) · width + state))
    step(b)    = max(bytes / (bandwidth · e_b), flops / (peak · e_c)) + layers · overhead
    prompt(P)  = (2 · (P · active + head) + Σ layers of a kind · (2 · pairs · width + P · state))
                 / (peak · e_c), but never less than a step

`width` is query heads · (key + value), `pairs` the tokens that the tokens of a prompt see, P² / 2
without a window, `state` the bytes of a recurrent state (`secateur.models.shape`).

Of a mixture with E experts and k for each token, b tokens read E · (1 − (1 − k / E)^b) experts of a
layer, if the router spreads them evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from secateur.advisor.facts import Efficiency, Estimate, Hardware
from secateur.advisor.options import CompressionWay
from secateur.models.shape import CHUNK_TOKENS, ModelShape, ServingMemory, memory_with

PARALLEL_EFFICIENCY = 0.85
"""What each device still gives when several share a model; our estimate for tensor parallelism."""


class TimeModel(Protocol):
    """Predicts times on a device."""

    def step(self, model: ModelShape, option: CompressionWay, batch: int, context: int) -> Estimate:
        """Seconds until every sequence of a batch has one more token.

        Args:
            model: already cut.
            option: how it is stored.
            batch: sequences.
            context: tokens of each so far.
        """
        ...

    def prompt(self, model: ModelShape, option: CompressionWay, tokens: int) -> Estimate:
        """Seconds to process a prompt."""
        ...


def weights_read(model: ModelShape, batch: int) -> float:
    """Weights of the linears that a step reads: of a mixture, the experts that are hit."""
    if not model.experts:
        return model.linears
    dense = model.linears - model.expert_weights
    share = (model.active - dense) / model.expert_weights
    return dense + model.expert_weights * (1 - (1 - share) ** batch)


@dataclass(frozen=True)
class Roofline:
    """Times from a data sheet.

    Attributes:
        device: its bandwidth and peak.
        efficiency: what engines reach of them.
        devices: how many share the model (tensor parallelism).
    """

    device: Hardware
    efficiency: Efficiency
    devices: int = 1

    @property
    def together(self) -> float:
        """How many single devices all of them equal."""
        return self.devices * (PARALLEL_EFFICIENCY if self.devices > 1 else 1.0)

    def step(self, model: ModelShape, option: CompressionWay, batch: int, context: int) -> Estimate:
        """See the module: the larger of reading and computing, and the overhead of layers."""
        gain = option.zeros.decode  # measured; where there is none, the bytes decide
        bits = option.bits if gain is None else option.values.bits
        linears = weights_read(model, batch) * bits / 8
        cache = batch * model.cache_read_bytes(context)
        rest = model.head * option.head_bits(model) / 8 + cache
        scale = (gain or Estimate.exact(1.0)).map(lambda factor: 1 / factor)
        assert self.device.bandwidth_gb_s is not None
        bandwidth = self.device.bandwidth_gb_s * 1e9 * self.together
        reached = Estimate(*self.efficiency.bandwidth).map(lambda e: 1 / (bandwidth * e))
        reading = (scale * linears + Estimate.exact(rest)).times(reached)
        computing = self.computing(option, batch * model.step_operations(context))
        overhead = Estimate(*self.efficiency.layer_microseconds) * (1e-6 * model.layers)
        return reading.larger(computing) + overhead

    def prompt(self, model: ModelShape, option: CompressionWay, tokens: int) -> Estimate:
        """All tokens at once, but never faster than one step."""
        computing = self.computing(option, model.prompt_operations(tokens))
        return computing.larger(self.step(model, option, 1, 0))

    def computing(self, option: CompressionWay, operations: float) -> Estimate:
        """Seconds for floating-point or integer operations."""
        peak = self.device.tflops.get(option.values.product, self.device.tflops["bf16"])
        reached = Estimate(*self.efficiency.compute)
        return reached.map(lambda e: operations / (peak * 1e12 * self.together * e))


@dataclass(frozen=True)
class TokenTimes:
    """How long one token took in a model of these sizes on this machine, in seconds.

    Attributes:
        ends: embedding, head and everything outside the decoder layers.
        layers: all decoder layers.
        prompt: one token of a prompt.
    """

    ends: float
    layers: float
    prompt: float


@dataclass(frozen=True)
class Measured:
    """Times of packed models that were decoded on this machine.

    Attributes:
        model: the sizes that were timed.
        times: of each way to store it, by `CompressionWay.stored`.
        spread: how far off a prediction may be, as a fraction.
    """

    model: ModelShape
    times: Mapping[str, TokenTimes]
    spread: float = 0.15

    def step(self, model: ModelShape, option: CompressionWay, batch: int, context: int) -> Estimate:
        """Sequences decode one after the other; a cut model's layers take as much less time."""
        found = self.times[option.stored]
        return self.around(batch * (found.ends + found.layers * self.share(model)))

    def prompt(self, model: ModelShape, option: CompressionWay, tokens: int) -> Estimate:
        """Every token takes the same time."""
        found = self.times[option.stored]
        return self.around(tokens * found.prompt * self.share(model))

    def share(self, model: ModelShape) -> float:
        """The part of the linears that a cut model still has."""
        return model.active / self.model.active

    def around(self, seconds: float) -> Estimate:
        """A range around a measured time."""
        return Estimate(seconds * (1 - self.spread), seconds, seconds * (1 + self.spread))


GIB = 2**30


def weight_bytes(model: ModelShape, option: CompressionWay) -> int:
    """Bytes of the weights of a model that was already cut.

    The embedding is stored once; a tied head shares it.
    """
    linears = model.linears * option.bits / 8
    return round(linears + model.outer * option.head_bits(model) / 8 + model.other * 2)


def memory_of(
    model: ModelShape, option: CompressionWay, kind: str, batch: int, context: int
) -> ServingMemory:
    """The memory for some sequences at once.

    Args:
        model: already cut.
        option: how it is stored.
        kind: of the device, `cuda` or `cpu`.
        batch: sequences.
        context: tokens of each, prompt and answer together.
    """
    return memory_with(weight_bytes(model, option), model, kind, batch, context)


BATCHES = tuple(2**n for n in range(10))
SHARED_BY = (1, 2, 4, 8, 16)
"""How many devices may share one copy of a model."""

DAY_SECONDS = 86400


@dataclass(frozen=True)
class Load:
    """The load of a service, and its bounds.

    Attributes:
        requests_per_day: on an average day.
        prompt_tokens: of a request.
        new_tokens: of an answer.
        peak: the busiest second has so many times the requests of an average one.
        utilisation: the fraction of a device's time that may be planned.
        token_ms: the largest time between two tokens of an answer, for 99 of 100; None for any.
        first_token_ms: the largest time to the first token of an idle device; None for any.
    """

    requests_per_day: float
    prompt_tokens: int
    new_tokens: int
    peak: float = 2.0
    utilisation: float = 0.7
    token_ms: float | None = None
    first_token_ms: float | None = None

    @property
    def context(self) -> int:
        """Tokens of a request and its answer."""
        return self.prompt_tokens + self.new_tokens

    @property
    def requests_per_second(self) -> float:
        """At the peak."""
        return self.requests_per_day / DAY_SECONDS * self.peak


@dataclass(frozen=True)
class ServingDevice:
    """What the capacity needs of a device.

    Attributes:
        kind: `cuda` or `cpu`.
        memory_bytes: of one.
        speed: predicts times when so many share a model.
        most: how many may share a model.
        most_batch: the largest batch that the engine takes.
    """

    kind: str
    memory_bytes: int
    speed: Callable[[int], TimeModel]
    most: int = SHARED_BY[-1]
    most_batch: int = BATCHES[-1]


@dataclass(frozen=True)
class Capacity:
    """One option under a load.

    Attributes:
        shared_by: devices that share one copy of the model.
        batch: sequences at once that this load needs.
        memory: of one copy at this batch.
        step: seconds of a step at this batch.
        p99: seconds between two tokens, for 99 of 100.
        alone: seconds of a step at batch 1.
        first_token: seconds to process a prompt.
        busy: seconds of a copy for one request, at this batch.
        least_busy: the same at the batch that serves most.
        replicas: copies, with the typical times.
        replicas_range: copies with the quickest and the slowest times.
    """

    shared_by: int
    batch: int
    memory: ServingMemory
    step: Estimate
    p99: Estimate
    alone: Estimate
    first_token: Estimate
    busy: Estimate
    least_busy: Estimate
    replicas: int
    replicas_range: tuple[int, int]

    @property
    def devices(self) -> Estimate:
        """Devices of all copies."""
        low, high = self.replicas_range
        return Estimate(low, self.replicas, high) * self.shared_by

    def seconds(self, tokens: int) -> Estimate:
        """The time of a request with an answer of so many tokens, without waiting: its median."""
        return self.first_token + self.step * tokens

    def used(self, load: Load) -> float:
        """The part of the copies that the busiest moment of a load needs, with typical times."""
        most = most_requests(self.least_busy.typical, load)
        return load.requests_per_day / (self.replicas * most)


@dataclass(frozen=True)
class TooMuch:
    """Why an option cannot serve a load.

    Attributes:
        reason: with numbers.
        bound: what it breaks: `memory`, `token_ms` or `first_token_ms`.
        least: what it needs, in bytes or milliseconds.
    """

    reason: str
    bound: str
    least: float


def capacity_of(
    model: ModelShape, option: CompressionWay, device: ServingDevice, load: Load
) -> Capacity | TooMuch:
    """The devices that an option needs, or why none suffice.

    Args:
        model: not cut yet.
        option: the way.
        device: what it runs on.
        load: requests, tokens and latencies.
    """
    shape = option.shape(model)
    least = memory_of(shape, option, device.kind, 1, load.context)
    choices = [n for n in SHARED_BY if n <= device.most and least.total <= n * device.memory_bytes]
    if not choices:
        there = f"{device.most} x {device.memory_bytes / GIB:.1f} GiB are there"
        return TooMuch(f"needs {least.total / GIB:.1f} GiB, {there}", "memory", least.total)
    capacities = [_shared(shape, option, device, load, devices) for devices in choices]
    found = [one for one in capacities if isinstance(one, Capacity)]
    return min(found, key=lambda one: one.devices.typical) if found else capacities[0]


def _shared(
    shape: ModelShape, option: CompressionWay, device: ServingDevice, load: Load, devices: int
) -> Capacity | TooMuch:
    """What an option needs when so many devices share a copy, whose memory is large enough."""
    speed = device.speed(devices)
    memory = {b: memory_of(shape, option, device.kind, b, load.context) for b in BATCHES}
    room = devices * device.memory_bytes
    fits = [b for b in BATCHES if b <= device.most_batch and memory[b].total <= room]
    first = speed.prompt(shape, option, load.prompt_tokens)
    chunk = speed.prompt(shape, option, min(load.prompt_tokens, CHUNK_TOKENS))
    steps = {b: speed.step(shape, option, b, load.context) for b in fits}
    p99 = {b: steps[b] + chunk if b > 1 else steps[b] for b in fits}
    quick = [b for b in fits if _within(p99[b].typical, load.token_ms)]
    if not quick or not _within(first.typical, load.first_token_ms):
        slow, first_ms = p99[1].typical * 1e3, first.typical * 1e3
        if not _within(p99[1].typical, load.token_ms):
            reason = f"{_shown(slow)} ms between two tokens (99 of 100), {load.token_ms:g} allowed"
            return TooMuch(reason, "token_ms", slow)
        reason = f"{_shown(first_ms)} ms to the first token, {load.first_token_ms:g} allowed"
        return TooMuch(reason, "first_token_ms", first_ms)
    busy = {b: first + steps[b] * (load.new_tokens / b) for b in quick}
    needed = {b: busy[b].map(lambda seconds: _copies(seconds, load)) for b in quick}
    best = min(quick, key=lambda b: busy[b].typical)
    batch = next(b for b in quick if needed[b] == needed[best])
    most = needed[batch]
    return Capacity(
        devices, batch, memory[batch], steps[batch], p99[batch], steps[1], first,
        busy[batch], busy[best], round(most.typical), (round(most.low), round(most.high)),
    )  # fmt: skip


def _within(seconds: float, bound_ms: float | None) -> bool:
    """Whether a time keeps its bound."""
    return bound_ms is None or seconds * 1e3 <= bound_ms


def _copies(busy: float, load: Load) -> float:
    """Copies of the model for a load; at least one."""
    return max(1, math.ceil(load.requests_per_second * busy / load.utilisation))


def most_requests(busy: float, load: Load) -> float:
    """Requests per day that one copy can serve: utilisation / busy / peak · 86400."""
    return load.utilisation / busy / load.peak * DAY_SECONDS


def _shown(milliseconds: float) -> str:
    """A time that is not rounded to the bound that it breaks."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
