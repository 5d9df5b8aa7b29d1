"""Times of tokens on this machine, measured once with random weights and kept in a table.

A model of the same sizes gets random matrices, each layer in memory of its own, and decodes in our
loop (`random_models`). The time of a token of a model whose linears have several formats:

    token              = outside + Σ over linears of t(shape, format)
    t(shape, format)   = layers(format) · k(shape, format) / Σ over linears of k(shape, format)

layers(format) is the time of all decoder layers in our decode loop when every linear has this
format; attention and norms are in it. k is the time of a product by the kernel alone, on one of as
many different matrices as a model of these sizes has, so it says how the time of the layers is
divided among shapes; it is the lowest of several. So a model with all linears in one format takes
what the loop took. outside is the time of embedding, last norm and head in int8.

A shared machine is faster in one minute and slower in the next, and a model that lies in the cache
gains from a quiet moment more than one that does not. So a format takes turns with `BASE`, both
take the median of their tokens, and the ratio is kept: the median over the turns. Sparsities in
between are interpolated.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from secateur.models.cache import cache_folder, writing_cache
from secateur.progress import Progress
from secateur.recipes.deploy import Sampling
from secateur.runs.environment import environment
from secateur.runs.measured import Drawing
from secateur.runs.output import write_json
from secateur.runtime import random_models
from secateur.runtime.formats import WeightFormat
from secateur.runtime.kernels.dispatch import by_kernel
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.random_models import LAYER_BYTES, FormatTimer, TokenTime
from secateur.runtime.sampling import Draws
from secateur.runtime.speculative import guessed, verified
from secateur.timing import alternate, seconds_of

TURNS = 3
"""Turns of a format that is timed alone."""

Shape = tuple[int, int]

Loop = tuple[float, float, float]
"""Seconds of a token outside the decoder layers, in all of them, and in those of `BASE` that were
timed in the same turns."""

BASE = WeightFormat("int8", 0.0)
"""How linears are stored in the loop that is timed. Speed-ups are relative to it."""

LEAST_MATRICES, PASSES, LOOP_TURNS = 2, 12, 7

SPREAD, DRAWN, WEIGHTS = 3.0, 50, 64 << 20
"""Of the logits that tokens are drawn from; how many tokens are drawn; bytes that are read before
each."""

MOST_HEADS = 16
"""Different matrices that an output head is timed on, at most."""


class _TimeTable:
    """Times that were measured once, in a file of the cache.

    The file has the times of several machines: of a processor, its threads, the tier of the kernels
    and the version of secateur. Every time has its date. What is no positive number, in a file that
    is damaged too, is measured again.

    Args:
        file: the table; None for the file in the cache.
        dates: of the times that were asked for.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file or cache_folder() / "times.json"
        self.dates: list[str] = []

    def read(self) -> dict[str, Any]:
        """The times of all machines."""
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def seconds(self, name: str, measure: Callable[[], Any]) -> Any:
        """A time, or a list of times, from the table or measured."""
        entry = self.read().get(machine(), {}).get(name, {})
        times = entry.get("seconds")
        kept = times if isinstance(times, list | tuple) else [times]
        right = [isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in kept]
        if not (right and all(right)):
            entry = {"seconds": measure(), "measured": date.today().isoformat()}
            known = self.read()  # other processes may have written meanwhile
            known.setdefault(machine(), {})[name] = entry
            with writing_cache(self.file.parent):
                write_json(self.file, known)
        self.dates.append(entry["measured"])
        return entry["seconds"]


def machine() -> str:
    """What a time depends on besides the matrix."""
    here, kernels = environment(torch.device("cpu")), kernel_info()
    return f"{here['cpu']}, {kernels.threads} threads, {kernels.tier}, secateur {here['secateur']}"


def _entry(what: Any, stored: WeightFormat) -> str:
    """The name of a time in the table: of a shape, or of a model with the sizes of a config."""
    if isinstance(what, tuple):
        name = f"{what[0]} x {what[1]}"
    else:
        numbers = {name: value for name, value in what.to_dict().items() if isinstance(value, int)}
        digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{what.model_type} of sizes {digest}"
    layout = f"bitmask with {stored.sparsity:.0%} zeros" if stored.sparsity else "dense"
    return f"{name}, {stored.values}, {layout}, one token"


@torch.inference_mode()
def time_tokens(
    config: Any,
    formats: Sequence[WeightFormat],
    progress: Progress,
    *,
    file: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[WeightFormat, TokenTime], str]:
    """Time a model of some sizes in several formats.

    Args:
        config: of transformers, of a family in `layer_forms.FORMS`.
        formats: of its linears.
        progress: receives every format.
        file: where measured times are kept; None for the file in the cache.
        clock: returns seconds.

    Returns:
        The times, and the earliest date of one.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """
    table = _TimeTable(file)
    found: dict[WeightFormat, TokenTime] = {}

    def measure() -> list[float]:
        [turns] = alternate(
            [FormatTimer(config, stored, clock)], FormatTimer.turn, list, turns=TURNS
        )
        return [statistics.median(each) for each in zip(*turns, strict=True)]

    progress.start("timing tokens", len(formats))
    for stored in formats:
        name = f"{_entry(config, stored)}: outside, layers, prompt"
        found[stored] = TokenTime(*table.seconds(name, measure))
        progress.step(note=f"{stored.values}, {stored.sparsity:.0%} zeros")
    progress.finish()
    return found, min(table.dates)


@dataclass(frozen=True)
class MatrixTimes:
    """Times of the linears of a model.

    Attributes:
        layers: seconds of all decoder layers with every linear in one format.
        shares: of this time, the part of one linear, for each shape [out, in] and format.
        rest: seconds of a token outside the decoder layers.
    """

    layers: Mapping[WeightFormat, float]
    shares: Mapping[tuple[Shape, WeightFormat], float]
    rest: float

    @property
    def base(self) -> float:
        """Seconds of a token with all linears on `BASE`."""
        return self.rest + self.layers[BASE]

    def seconds(self, shape: Shape, stored: WeightFormat) -> float:
        """Of a linear, for one token; by the nearest two sparsities if its own was not timed."""
        if stored in self.layers:
            return self.layers[stored] * self.shares[shape, stored]
        timed = [one for one in self.layers if one.values == stored.values and one.sparsity]
        low, high = sorted(timed, key=lambda one: abs(one.sparsity - stored.sparsity))[:2]
        at_low, at_high = self.seconds(shape, low), self.seconds(shape, high)
        steps = (stored.sparsity - low.sparsity) / (high.sparsity - low.sparsity)
        return at_low + steps * (at_high - at_low)


@torch.inference_mode()
def time_matrices(
    config: Any,
    shapes: Sequence[Shape],
    formats: Sequence[WeightFormat],
    progress: Progress,
    *,
    file: Path | None = None,
    timer: Callable[[Shape, WeightFormat, int], float] | None = None,
    loop: Callable[[Any, WeightFormat], Loop] | None = None,
) -> MatrixTimes:
    """Read the table, and time what it does not have yet.

    Args:
        config: of transformers, of a family in `layer_forms.FORMS`.
        shapes: [out, in] of every linear of the model, one entry for each linear.
        formats: how they are stored.
        progress: receives every time.
        file: the table; None for the file in the cache.
        timer: seconds of a matrix, one of so many; the kernels if not given.
        loop: seconds of a token (`Loop`); those of the decode loop if not given.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """
    table, counts = _TimeTable(file), Counter(shapes)
    every = list(dict.fromkeys([BASE, *formats]))
    progress.start("timing matrices", len(every) * (1 + len(counts)))

    def known(name: str, measure: Callable[..., Any], *what: Any) -> Any:
        seconds = table.seconds(name, lambda: measure(*what))
        progress.step(note=name)
        return seconds

    layers: dict[WeightFormat, float] = {}
    shares: dict[tuple[Shape, WeightFormat], float] = {}
    rest = 0.0
    for stored in every:
        name = f"{_entry(config, stored)}: outside, layers, base"
        outside, own, base = known(name, loop or looped, config, stored)
        rest = outside if stored == BASE else rest
        # the ratio to `BASE` in the same turns, times the one time of `BASE`: the machine may have
        # been faster or slower in these turns
        layers[stored] = own * layers.get(BASE, base) / base
        alone = {}
        for shape in counts:
            count = how_many(counts, shape, stored)
            alone[shape] = known(_entry(shape, stored), timer or timed, shape, stored, count)
        whole = sum(alone[shape] * count for shape, count in counts.items())  # of all linears
        shares |= {(shape, stored): alone[shape] / whole for shape in counts}
    progress.finish()
    return MatrixTimes(layers, shares, rest)


def looped(config: Any, stored: WeightFormat) -> Loop:
    """The decode loop's times of a format, in turns with `BASE`."""
    other = FormatTimer(config, BASE)
    timer = other if stored == BASE else FormatTimer(config, stored)
    own, base = alternate([timer, other], FormatTimer.turn, list, turns=LOOP_TURNS)
    outside = statistics.median(turn.outside for turn in own)
    layers = statistics.median(turn.layers for turn in base)
    ratio = statistics.median(a.layers / b.layers for a, b in zip(own, base, strict=True))
    return outside, layers if stored == BASE else ratio * layers, layers


def timed(shape: Shape, stored: WeightFormat, count: int) -> float:
    """Seconds of one product with a matrix, one of so many different ones."""
    first = random_models.random_matrix(*shape, stored.values, stored.sparsity)
    # every product reads another matrix, so none finds its own in a cache
    matrices = [first, *(random_models.another(first) for _ in range(count - 1))]
    x = torch.randn(1, shape[1]).to(torch.bfloat16)

    def seconds(matrix: KernelMatrix) -> float:
        return seconds_of(lambda: by_kernel(matrix, x))

    # the lowest of each matrix, and their mean: some lie better in memory than others
    least: list[float] = alternate(matrices, seconds, min, turns=PASSES)
    return statistics.mean(least)


@torch.inference_mode()
def time_head(shape: Shape, stored: WeightFormat, *, file: Path | None = None) -> float:
    """Seconds of one product with an output head, from the table or measured.

    Args:
        shape: [rows, hidden]: all tokens of the vocabulary, or some.
        stored: its format.
        file: the table; None for the file in the cache.
    """
    rows, columns = shape
    fit = round(8 * LAYER_BYTES / stored.bits / rows / columns)
    count = min(MOST_HEADS, max(LEAST_MATRICES, fit))
    name = f"{_entry(shape, stored)}, a head"
    seconds: float = _TimeTable(file).seconds(name, lambda: timed(shape, stored, count))
    return seconds


@torch.inference_mode()
def time_drawing(
    temperature: float, vocabulary: int, rows: int | None = None, *, file: Path | None = None
) -> Drawing:
    """Seconds of drawing a token of a draft, and of judging it, from the table or measured.

    Args:
        temperature: at which both are drawn.
        vocabulary: number of tokens of the parent.
        rows: of the draft's head; None for the whole vocabulary.
        file: the table; None for the file in the cache.
    """

    def measure() -> list[float]:
        ids = None if rows is None else torch.arange(rows)
        draws = Draws(Sampling(temperature=temperature))
        logits = SPREAD * torch.randn(2, vocabulary)
        guesses = [guessed(draws, logits[0, :rows], vocabulary, ids)]
        calls = (
            lambda: guessed(draws, logits[0, :rows], vocabulary, ids),
            lambda: [*verified(draws, logits[1:], guesses)],
        )
        weights = torch.ones(WEIGHTS, dtype=torch.uint8)

        def seconds(call: Callable[[], object]) -> float:
            weights.max()  # a model's weights leave nothing of Python in the caches
            return seconds_of(call)

        return alternate(calls, seconds, statistics.median, turns=DRAWN)

    name = f"drawing of {rows or vocabulary} and {vocabulary} tokens at temperature {temperature:g}"
    return Drawing(*_TimeTable(file).seconds(name, measure))


def how_many(counts: Mapping[Shape, int], shape: Shape, stored: WeightFormat) -> int:
    """Matrices of a shape that have as many bytes as the model's linears together."""
    size = stored.bits / 8
    whole = sum(rows * columns * count for (rows, columns), count in counts.items()) * size
    each = shape[0] * shape[1] * size
    return max(LEAST_MATRICES, round(min(whole, LAYER_BYTES) / each))
