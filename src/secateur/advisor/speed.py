"""The time of a token and of a prompt: by the roofline of a data sheet, or by measured kernels.

Roofline (Williams et al., CACM 2009), for a batch of b sequences with T tokens of context:

    bytes(b)   = weights that are read · bits / 8 + b · cache that is read
    flops(b)   = b · (2 · per_token + Σ layers of a kind · (2 · min(T, window) · width + state))
    step(b)    = max(bytes / (bandwidth · e_b), flops / (peak · e_c)) + layers · overhead
    prompt(P)  = (2 · P · per_token + Σ layers of a kind · (2 · pairs · width + P · state))
                 / (peak · e_c), but never less than a step

`width` is query heads · (key + value), `pairs` the tokens that the tokens of a prompt see, P² / 2
without a window, `state` the bytes of a recurrent state (`secateur.models.layer_cache`).

Of a mixture with E experts and k for each token, b tokens read E · (1 − (1 − k / E)^b) experts of a
layer, if the router spreads them evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from secateur.advisor.facts import Efficiency, Estimate, Hardware
from secateur.advisor.options import CompressionWay
from secateur.advisor.shape import ModelShape

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
        rest = model.head * option.head_bits / 8 + cache
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
