"""A table of times that were measured once on this machine, and the time of a token from it.

    token              = rest + Σ over linears of t(shape, format)
    t(shape, format)   = layers(format) · k(shape, format) / Σ over linears of k(shape, format)

layers(format) is the time of all decoder layers in our decode loop when every linear has this
format, with random weights (`token_times`); attention and norms are in it. k is the time of a
product by the kernel alone, on one of as many different matrices as a model of these sizes has, so
it says how the time of the layers is divided among shapes; it is the lowest of several. So a model
with all linears in one format takes what the loop took. rest is the time of embedding, last norm
and head in int8.

A shared machine is faster in one minute and slower in the next, and a model that lies in the cache
gains from a quiet moment more than one that does not. So a format takes turns with `BASE`, both
take the median of their tokens, and the ratio is kept: the median over the turns.

The table is a file in the cache. A machine is a processor, its threads, the tier of the kernels and
the version of secateur; every time has its date. An entry that is no positive number is measured
again. Sparsities in between are interpolated.
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

from secateur.evaluation.token_times import (
    LAYER_BYTES,
    FormatTimer,
    WeightFormat,
    another,
    kept_times,
    plausible,
    random_matrix,
)
from secateur.models.samples import cache_folder
from secateur.progress import Progress
from secateur.runs.atomic import write_json
from secateur.runs.environment import environment
from secateur.runtime.kernels.dispatch import by_kernel
from secateur.runtime.kernels.library import kernel_info

Shape = tuple[int, int]

Loop = tuple[float, float, float]
"""Seconds of a token outside the decoder layers, in all of them, and in those of `BASE` that were
timed in the same turns."""

BASE = WeightFormat("int8", 0.0)
"""How linears are stored in the loop that is timed. Speed-ups are relative to it."""

LEAST_MATRICES, PASSES, TURNS = 2, 12, 7


@dataclass(frozen=True)
class MatrixTimes:
    """Times of the linears of a model.

    Attributes:
        layers: seconds of all decoder layers with every linear in one format.
        shares: of this time, the part of one linear, for each shape [out, in] and format.
        rest: seconds of a token outside the decoder layers.
        measured: the earliest date of a time.
    """

    layers: Mapping[WeightFormat, float]
    shares: Mapping[tuple[Shape, WeightFormat], float]
    rest: float
    measured: str

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
        config: of transformers, of a decoder of Llama's shape.
        shapes: [out, in] of every linear of the model, one entry for each linear.
        formats: how they are stored.
        progress: receives every time.
        file: the table; None for the file in the cache.
        timer: seconds of a matrix, one of so many; the kernels if not given.
        loop: seconds of a token (`Loop`); those of the decode loop if not given.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """
    file = file or cache_folder() / "matrix-times.json"
    counts, every = Counter(shapes), list(dict.fromkeys([BASE, *formats]))
    table, dates = _read_table(file), []
    progress.start("timing matrices", len(every) * (1 + len(counts)))

    def known(name: str, measure: Callable[..., Any], *what: Any) -> Any:
        if not plausible(table.get(name, {}).get("seconds")):
            table[name] = {"seconds": measure(*what), "measured": date.today().isoformat()}
            _add_entry(file, name, table[name])
        dates.append(table[name]["measured"])
        progress.step(note=name)
        return table[name]["seconds"]

    layers: dict[WeightFormat, float] = {}
    shares: dict[tuple[Shape, WeightFormat], float] = {}
    rest = 0.0
    for stored in every:
        outside, own, base = known(_loop_entry(config, stored), loop or looped, config, stored)
        rest = outside if stored == BASE else rest
        layers[stored] = own * layers.get(BASE, base) / base
        alone = {}
        for shape in counts:
            count = how_many(counts, shape, stored)
            alone[shape] = known(_matrix_entry(shape, stored), timer or timed, shape, stored, count)
        whole = sum(alone[shape] * count for shape, count in counts.items())
        shares |= {(shape, stored): alone[shape] / whole for shape in counts}
    progress.finish()
    return MatrixTimes(layers, shares, rest, min(dates))


def looped(config: Any, stored: WeightFormat) -> Loop:
    """The decode loop's times of a format, in turns with `BASE`."""
    other = FormatTimer(config, BASE)
    timer = other if stored == BASE else FormatTimer(config, stored)
    for one in (other, timer):
        one.turn()  # the first prompt also touches all memory
    turns = [(timer.turn(), other.turn()) for _ in range(TURNS)]
    outside = statistics.median(own.ends for own, _ in turns)
    layers = statistics.median(base.layers for _, base in turns)
    ratio = statistics.median(own.layers / base.layers for own, base in turns)
    return outside, layers if stored == BASE else ratio * layers, layers


def timed(shape: Shape, stored: WeightFormat, count: int) -> float:
    """Seconds of one product with a matrix, one of so many different ones."""
    first = random_matrix(*shape, stored.values, stored.sparsity)
    matrices = [first, *(another(first) for _ in range(count - 1))]
    x = torch.randn(1, shape[1]).to(torch.bfloat16)
    least = [math.inf] * count
    for _ in range(PASSES):
        for number, matrix in enumerate(matrices):
            began = time.perf_counter()
            by_kernel(matrix, x)
            least[number] = min(least[number], time.perf_counter() - began)
    return statistics.mean(least)


def how_many(counts: Mapping[Shape, int], shape: Shape, stored: WeightFormat) -> int:
    """Matrices of a shape that have as many bytes as the model's linears together."""
    whole = (
        sum(rows * columns * count for (rows, columns), count in counts.items()) * stored.bits / 8
    )
    each = shape[0] * shape[1] * stored.bits / 8
    return max(LEAST_MATRICES, round(min(whole, LAYER_BYTES) / each))


def machine() -> str:
    """What a time depends on besides the matrix."""
    here, kernels = environment(torch.device("cpu")), kernel_info()
    return f"{here['cpu']}, {kernels.threads} threads, {kernels.tier}, secateur {here['secateur']}"


def _loop_entry(config: Any, stored: WeightFormat) -> str:
    """The name of a loop in the table."""
    numbers = {name: value for name, value in config.to_dict().items() if isinstance(value, int)}
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:12]
    return f"{config.model_type} of sizes {digest}, {_format_storage(stored)}: ends, layers, base"


def _matrix_entry(shape: Shape, stored: WeightFormat) -> str:
    """The name of a matrix in the table."""
    return f"{shape[0]} x {shape[1]}, {_format_storage(stored)}"


def _format_storage(stored: WeightFormat) -> str:
    """Values and layout."""
    layout = f"bitmask with {stored.sparsity:.0%} zeros" if stored.sparsity else "dense"
    return f"{stored.values}, {layout}, one token"


def _read_table(file: Path) -> dict[str, Any]:
    """The times on this machine."""
    found: dict[str, Any] = kept_times(file).get(machine(), {})
    return found


def _add_entry(file: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Write a time beside those that other processes may have written meanwhile."""
    known = kept_times(file)
    known.setdefault(machine(), {})[name] = dict(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known)
