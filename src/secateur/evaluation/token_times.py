"""Times tokens of a model that has no weights yet, in every format of our runtime.

A model of the same sizes gets random matrices, each layer in memory of its own. Then it decodes:

    token  = t(0) + L · (t(n) − t(0)) / n         prompt token = L / n · t(prompt of P) / P

t(n) is the time of a token with n decoder layers, t(0) that of embedding, last norm and head. If
all layers have less than `LAYER_BYTES`, then n = L and nothing is extrapolated. Measured times are
kept in the cache, with their date; the key holds the sizes, the processor and the kernels.

The matrices are random, since speed does not depend on the numbers.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.samples import cache_folder
from secateur.models.skeleton import assign, quiet_transformers, without_weights
from secateur.progress import Progress
from secateur.quantization.groups import Scales
from secateur.runs.atomic import write_json
from secateur.runs.environment import environment
from secateur.runtime.decode import FAMILIES, Decoder, why_not
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.install import settle
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.linear import PackedEmbedding, PackedLinear

LAYER_BYTES = 768 * 2**20
"""Bytes of decoder layers to time, as they are stored: more than any cache of a processor."""

PROMPT_TOKENS, CONTEXT_TOKENS = 64, 64
TURNS, STEPS = 3, 12

MOST_STEPS = 20 * STEPS
"""Tokens of a turn, at most: where layers take less than the clock or other work shakes, a turn has
more than `STEPS`."""

LEAST_LAYERS = 0.01
"""What decoder layers take at least, as a fraction of `FormatTimes.ends`. Less cannot be
measured."""


@dataclass(frozen=True)
class WeightFormat:
    """How the linears are stored.

    Attributes:
        values: bf16, int8 or int4. With integers the embedding and the head are int8.
        sparsity: the fraction of zeros, stored with a bitmask; 0 for dense matrices.
    """

    values: str
    sparsity: float

    @property
    def bits(self) -> float:
        """Bits of a weight, without scales."""
        size = {"bf16": 16, "int8": 8, "int4": 4}[self.values]
        return size * (1 - self.sparsity) + (1 if self.sparsity else 0)


@dataclass(frozen=True)
class FormatTimes:
    """Seconds of one token.

    Attributes:
        ends: embedding, last norm and head.
        layers: all decoder layers.
        prompt: one token of a prompt.
        measured: the date.
    """

    ends: float
    layers: float
    prompt: float
    measured: str


@torch.inference_mode()
def time_tokens(
    config: Any,
    formats: Sequence[WeightFormat],
    progress: Progress,
    *,
    file: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[WeightFormat, FormatTimes]:
    """Time a model of some sizes in several formats.

    Args:
        config: of transformers, of a decoder of Llama's shape.
        formats: of its linears.
        progress: receives every format.
        file: where measured times are kept; None for the file in the cache.
        clock: returns seconds.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """
    file = file or cache_folder() / "token-times.json"
    known = kept_times(file)
    found: dict[WeightFormat, FormatTimes] = {}
    progress.start("timing tokens", len(formats))
    for stored in formats:
        key = _key_of(config, stored)
        kept = known.get(key, {})
        if not plausible([kept.get(name) for name in ("ends", "layers", "prompt")]):
            timed = _time_format(config, stored, clock)
            known = kept_times(file)
            known[key] = asdict(timed)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known)
        found[stored] = FormatTimes(**known[key])
        progress.step(note=f"{stored.values}, {stored.sparsity:.0%} zeros")
    progress.finish()
    return found


def kept_times(file: Path) -> dict[str, Any]:
    """The times in a file; none if it is missing or damaged: they can be measured again."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def plausible(seconds: Any) -> bool:
    """Whether kept times can be used: there are some, and all are finite and above 0."""
    times = seconds if isinstance(seconds, list | tuple) else [seconds]
    numbers = [x for x in times if isinstance(x, int | float) and math.isfinite(x) and x > 0]
    return bool(times) and len(numbers) == len(times)


def _key_of(config: Any, stored: WeightFormat) -> str:
    """Everything that a time depends on."""
    here = environment(torch.device("cpu"))
    sizes = {name: value for name, value in config.to_dict().items() if isinstance(value, int)}
    facts: Mapping[str, Any] = {
        "type": config.model_type,
        "sizes": sizes,
        "way": asdict(stored),
        "processor": [here["cpu"], here["threads"], kernel_info().tier, here["secateur"]],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def _time_format(config: Any, stored: WeightFormat, clock: Callable[[], float]) -> FormatTimes:
    """Time one format: the median of some turns."""
    timer = FormatTimer(config, stored, clock)
    timer.turn()  # the first prompt also touches all memory
    turns = [timer.turn() for _ in range(TURNS)]
    return FormatTimes(
        statistics.median(turn.ends for turn in turns),
        statistics.median(turn.layers for turn in turns),
        statistics.median(turn.prompt for turn in turns),
        turns[0].measured,
    )


class FormatTimer:
    """A random model whose linears have one format, ready to be timed.

    Args:
        config: of transformers, of a decoder of Llama's shape.
        stored: the format of its linears.
        clock: returns seconds.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """

    def __init__(
        self,
        config: Any,
        stored: WeightFormat,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if config.model_type not in FAMILIES:
            raise _cannot(config, f"its type is not one of {', '.join(FAMILIES)}")
        model = random_model(config, stored)
        reason = why_not(model, PROMPT_TOKENS + CONTEXT_TOKENS)
        if reason is not None:
            raise _cannot(config, reason)
        settle(model, torch.bfloat16)
        self.clock = clock
        self.layers, self.count = config.num_hidden_layers, len(model.model.layers)
        self.decoder = Decoder(model, PROMPT_TOKENS + 2 * STEPS)
        self.ids = torch.arange(PROMPT_TOKENS) % config.vocab_size

    @torch.inference_mode()
    def turn(self) -> FormatTimes:
        """Read a prompt and decode some tokens, with all layers and with none."""
        began = self.clock()
        self.decoder.prefill(self.ids)
        prompt = self.clock() - began
        whole: list[float] = []
        bare: list[float] = []
        while len(whole) < MOST_STEPS:
            whole += _steps(self.decoder, self.count, self.clock)
            bare += _steps(self.decoder, 0, self.clock)
            self.decoder.slots.rewind(0, PROMPT_TOKENS)
            outer = statistics.median(bare)
            between = statistics.median(whole) - outer
            if between > LEAST_LAYERS * outer:
                break
        times = self.layers / self.count
        layers = max(between, LEAST_LAYERS * outer) * times
        return FormatTimes(outer, layers, prompt * times / PROMPT_TOKENS, date.today().isoformat())


def _cannot(config: Any, reason: str) -> ArchitectureError:
    """The error for a model that our loop does not decode."""
    return ArchitectureError(
        f"this model cannot be timed without its weights: {reason}",
        where=str(config.model_type),
        remedy="name other hardware, or time the model itself with `secateur bench`",
    )


def _steps(decoder: Decoder, layers: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of some tokens with the first decoder layers; the first one does not count."""
    decoder.slots.c.layers = layers
    found = []
    for _ in range(STEPS):
        began = clock()
        decoder.step(0)
        found.append(clock() - began)
    decoder.slots.c.layers = len(decoder.slots.model.model.layers)
    return found[1:]


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
            owner, _, leaf = path.rpartition(".")
            bias = None if module.bias is None else torch.zeros(shape[0], dtype=torch.bfloat16)
            setattr(layer.get_submodule(owner), leaf, PackedLinear(another(matrices[shape]), bias))
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
        exponent = torch.full((rows,), EXPONENT, dtype=torch.int8)
        return KernelMatrix.of_codes(codes, Scales(exponent, code), group, mask)
    scale = torch.rand(rows) * 2.0**EXPONENT if values == "int8" else None
    if mask is None:
        return KernelMatrix(numbers(rows * columns, values).view(rows, columns), scale=scale)
    return KernelMatrix(
        numbers(rows * kept, values), bitmask=pack_bits(mask), columns=columns, scale=scale
    )


@functools.cache
def _random_mask(rows: int, columns: int, kept: int) -> Tensor:
    """With the same number of ones in each row; the masks of some rows repeat."""
    some = torch.rand(min(rows, DIFFERENT_ROWS), columns).argsort(1) < kept
    return some.repeat(-(-rows // len(some)), 1)[:rows]


def numbers(count: int, values: str) -> Tensor:
    """Random values."""
    if values == "int8":
        return torch.randint(-127, 128, (count,), dtype=torch.int8)
    return torch.randn(count).mul_(0.02).to(FLOATS[values])


def another(matrix: KernelMatrix) -> KernelMatrix:
    """The same numbers in memory of their own."""
    found = copy.copy(matrix)
    found.values = matrix.values.clone()
    found.mask = None if matrix.mask is None else matrix.mask.clone()
    found.describe(matrix.c.type)
    return found
