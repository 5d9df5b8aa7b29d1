"""Random matrices and models with the sizes of a model, to be timed: numbers do not change speed.

A model that is too large is timed with n of its L decoder layers:

    token = outside + L · (t(n) − outside) / n

t(n) is the time of a token with n layers, and `outside` that with none: embedding, last norm and
head. If n = L, nothing is extrapolated.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.skeleton import assign, quiet_transformers, without_weights
from secateur.quantization.groups import Scales
from secateur.runtime.decode import Decoder
from secateur.runtime.formats import WeightFormat
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.install import settle
from secateur.runtime.kernels.linear import PackedEmbedding, PackedLinear
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.layer_forms import FORMS, why_not
from secateur.timing import seconds_of

LAYER_BYTES = 768 * 2**20
"""Bytes of decoder layers to time, as they are stored: more than any cache of a processor."""

PROMPT_TOKENS, CONTEXT_TOKENS = 64, 64
STEPS = 11
"""Timed tokens of a turn with all layers, and as many with none."""

MOST_STEPS = 240
"""Tokens of a turn, at most: where layers take less than the clock or other work shakes, a turn has
more than `STEPS`."""

LEAST_LAYERS = 0.01
"""What decoder layers take at least, as a fraction of `TokenTime.outside`. Less cannot be
measured."""


class TokenTime(NamedTuple):
    """Seconds of one token.

    Attributes:
        outside: embedding, last norm and head.
        layers: all decoder layers.
        prompt: one token of a prompt.
    """

    outside: float
    layers: float
    prompt: float


class RandomModel(ABC):
    """Some decoder layers of a model, with random weights, that decodes token by token.

    Args:
        layers: decoder layers of the whole model.
        count: those that are here.
        now: a clock that returns seconds.
    """

    def __init__(self, layers: int, count: int, now: Callable[[], float]) -> None:
        self.layers, self.count, self.now = layers, count, now

    @abstractmethod
    def step(self) -> None:
        """Decode one token."""

    @abstractmethod
    def without_layers(self) -> AbstractContextManager[None]:
        """Decode without the decoder layers meanwhile."""

    def turn(self, tokens: int = STEPS, most: int = MOST_STEPS) -> TokenTime:
        """Time some tokens with all layers that are here, and as many with none; no prompt.

        Args:
            tokens: number of timed tokens. One more before them refills the caches.
            most: tokens, if the layers take too little to be seen in fewer.
        """
        whole: list[float] = []
        bare: list[float] = []
        while len(whole) < most:
            whole += [seconds_of(self.step, self.now) for _ in range(1 + tokens)][1:]
            with self.without_layers():
                bare += [seconds_of(self.step, self.now) for _ in range(1 + tokens)][1:]
            outside = statistics.median(bare)
            between = statistics.median(whole) - outside
            if between > LEAST_LAYERS * outside:
                break
        # layers that are here stand for all of the model's
        layers = max(between, LEAST_LAYERS * outside) * self.layers / self.count
        return TokenTime(outside, layers, 0.0)


class FormatTimer(RandomModel):
    """A random model in our decode loop, whose linears have one format.

    Args:
        config: of transformers, of a family in `layer_forms.FORMS`.
        stored: the format of its linears.
        clock: returns seconds.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """

    def __init__(
        self, config: Any, stored: WeightFormat, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if config.model_type not in FORMS:
            raise _cannot(config, f"its type is not one of {', '.join(FORMS)}")
        model = random_model(config, stored)
        reason = why_not(model, PROMPT_TOKENS + 2 * (1 + STEPS))
        if reason is not None:
            raise _cannot(config, reason)
        settle(model, torch.bfloat16)
        super().__init__(config.num_hidden_layers, len(model.model.layers), clock)
        self.decoder = Decoder(model, PROMPT_TOKENS + 2 * (1 + STEPS))
        self.ids = torch.arange(PROMPT_TOKENS) % config.vocab_size
        self.turn()  # the first prompt also touches all memory

    def step(self) -> None:
        """As the contract says."""
        self.decoder.step(0)

    @contextmanager
    def without_layers(self) -> Iterator[None]:
        """As the contract says. Afterwards only the prompt is in the cache."""
        self.decoder.slots.c.layers = 0
        yield
        self.decoder.slots.c.layers = self.count
        self.decoder.slots.rewind(0, PROMPT_TOKENS)

    @torch.inference_mode()
    def turn(self, tokens: int = STEPS, most: int = MOST_STEPS) -> TokenTime:
        """Read a prompt and decode some tokens."""
        prompt = seconds_of(lambda: self.decoder.prefill(self.ids), self.now)
        each = prompt * self.layers / self.count / PROMPT_TOKENS  # of all layers, one token
        return super().turn(tokens, most)._replace(prompt=each)


def _cannot(config: Any, reason: str) -> ArchitectureError:
    """The error for a model that our loop does not decode."""
    return ArchitectureError(
        f"this model cannot be timed without its weights: {reason}",
        where=str(config.model_type),
        remedy="name other hardware, or time the model itself with `secateur bench`",
    )


def random_model(config: Any, stored: WeightFormat) -> Any:
    """A model with these sizes, as many layers as are timed, and random weights."""
    from transformers import AutoModelForCausalLM

    own = type(config).from_dict(config.to_dict())
    with quiet_transformers(), without_weights():
        model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16).eval()
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    count = min(len(sizes), max(2, round(LAYER_BYTES / (max(sizes) * stored.bits / 8))))
    model.model.layers = model.model.layers[:count]
    matrices: dict[tuple[int, int], KernelMatrix] = {}
    for layer in model.model.layers:
        _fill(layer, stored, matrices)
    outer = "int8" if stored.values in ("int8", "int4") else "bf16"
    embedding = model.get_input_embeddings()
    packed = random_matrix(embedding.num_embeddings, embedding.embedding_dim, outer)
    model.model.embed_tokens = PackedEmbedding(packed, torch.bfloat16)
    # tied, both read the same memory, as in the model itself
    model.lm_head = PackedLinear(packed if config.tie_word_embeddings else another(packed))
    assign(model.model.norm, "weight", torch.ones(config.hidden_size, dtype=torch.bfloat16))
    return model


def _fill(
    layer: nn.Module, stored: WeightFormat, matrices: dict[tuple[int, int], KernelMatrix]
) -> None:
    """Give every linear of a layer a random matrix of its own, and norms and biases ones."""
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            if shape not in matrices:
                matrices[shape] = random_matrix(*shape, stored.values, stored.sparsity)
            bias = None if module.bias is None else torch.zeros(shape[0], dtype=torch.bfloat16)
            layer.set_submodule(path, PackedLinear(another(matrices[shape]), bias))
    for name, parameter in list(layer.named_parameters()):
        if parameter.is_meta:
            assign(layer, name, torch.ones(parameter.shape, dtype=torch.bfloat16))


GROUP = 64
"""Weights that share a scale in int4."""

DIFFERENT_ROWS = 256
"""The zeros of so many rows are drawn; then they repeat."""

EXPONENT = -20
"""Of the scales of int4. It keeps sums of products small."""

FLOATS = {"bf16": torch.bfloat16, "float32": torch.float32}


def random_matrix(
    rows: int, columns: int, values: str, sparsity: float = 0.0, group: int = GROUP
) -> KernelMatrix:
    """A random matrix: dense, or with the same number of zeros in each row.

    Args:
        rows: out.
        columns: in.
        values: bf16, float32, int8 or int4.
        sparsity: the fraction of zeros; 0 for a dense matrix without a mask.
        group: weights that share a scale, for int4.
    """
    kept = columns - round(sparsity * columns)
    mask = _random_mask(rows, columns, kept) if sparsity else None
    if values == "int4":
        codes = torch.randint(-7, 8, (rows, columns), dtype=torch.int8)
        code = torch.randint(0, 256, (rows, -(-columns // group)), dtype=torch.uint8)
        exponent = torch.full((rows,), EXPONENT, dtype=torch.int8)  # scale = code · 2^exponent
        return KernelMatrix.of_codes(codes, Scales(exponent, code), group, mask)
    scale = torch.rand(rows) * 2.0**EXPONENT if values == "int8" else None
    if mask is None:
        return KernelMatrix(_numbers(rows * columns, values).view(rows, columns), scale=scale)
    return KernelMatrix(
        _numbers(rows * kept, values), bitmask=pack_bits(mask), columns=columns, scale=scale
    )


@functools.cache
def _random_mask(rows: int, columns: int, kept: int) -> Tensor:
    """With the same number of ones in each row; the masks of some rows repeat."""
    # a random order of the columns of each row, of which `kept` come first
    some = torch.rand(min(rows, DIFFERENT_ROWS), columns).argsort(1) < kept
    return some.repeat(-(-rows // len(some)), 1)[:rows]


def _numbers(count: int, values: str) -> Tensor:
    """Random values."""
    if values == "int8":
        return torch.randint(-127, 128, (count,), dtype=torch.int8)
    return torch.randn(count).mul_(0.02).to(FLOATS[values])


def another(matrix: KernelMatrix) -> KernelMatrix:
    """The same numbers in memory of their own."""
    found = copy.copy(matrix)
    found.values = matrix.values.clone()
    found.mask = None if matrix.mask is None else matrix.mask.clone()
    found.describe(matrix.c.type)  # the C description points to the new memory
    return found
