"""The memory that serving a model takes.

    weights  = linears · bits / 8 + ends · head_bits / 8 + other · 2
    KV cache = batch · Σ layers of a kind · (min(context, window) · values · 2 + state)
    working  = chunk · (4 · hidden + 2 · largest) · 2 + batch · vocabulary · 4
    total    = (weights + KV cache + working) · (1 + FRAGMENTATION) + RUNTIME

`values` are keys and values of a token, in bfloat16, or the latent vector of latent attention. A
layer without a window keeps them of all tokens, a recurrent layer has a state instead, and a layer
that reads the cache of another keeps nothing (`secateur.models.layer_cache`). `largest` is the
width of attention or of the whole residual stream, `chunk` the tokens of a prompt that are
processed together.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.advisor.options import CompressionWay
from secateur.advisor.shape import ModelShape

GIB = 2**30

FRAGMENTATION = {"cuda": 0.03, "cpu": 0.0}
"""ServingMemory that an allocator cannot use, as a fraction; our estimate for a paged cache."""

RUNTIME_BYTES = {"cuda": round(0.9 * GIB), "cpu": 185 * 2**20}
"""The context of the driver, kernels and graphs; on a CPU, the code of the model, measured here."""

CHUNK_TOKENS = 512
"""Tokens of a prompt that are processed at once."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes, by use.

    Attributes:
        weights: of the model.
        cache: keys, values and states of all sequences.
        working: activations and logits.
        overhead: fragmentation and the runtime.
    """

    weights: int
    cache: int
    working: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working + self.overhead


def weight_bytes(model: ModelShape, option: CompressionWay) -> int:
    """Bytes of the weights of a model that was already cut.

    The embedding is stored once; a tied head shares it.
    """
    linears = model.linears * option.bits / 8
    return round(linears + model.ends * option.head_bits / 8 + model.other * 2)


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


def memory_with(
    weights: int, model: ModelShape, kind: str, batch: int, context: int
) -> ServingMemory:
    """`memory_of` with known bytes of weights."""
    cache = round(batch * model.cache_bytes(context))
    chunk = min(CHUNK_TOKENS, batch * context)
    working = chunk * (4 * model.hidden + 2 * model.widest) * 2 + batch * model.vocabulary * 4
    part = weights + cache + working
    overhead = round(part * FRAGMENTATION[kind]) + RUNTIME_BYTES[kind]
    return ServingMemory(weights, cache, working, overhead)
