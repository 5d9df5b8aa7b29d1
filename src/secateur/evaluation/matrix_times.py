"""A table of matrices that were timed once on this machine, and the time of a token from it.

    token = rest + Σ over linears of t(shape, way)      rest = loop(int8) − Σ t(shape, int8)

t is the time of our kernel for one matrix and one token. The matrix is one of as many as a model of
these sizes has, all of them different, so that it comes from where a model's weights come from.
loop(int8) is a token of the decode loop in which all linears are dense int8 (`token_times`). So
the rest is attention, norms, embedding and head, and what calls cost. Each time is the lowest of
several, because other work on the machine can only lengthen one: for every matrix of all passes,
and then the mean over matrices.

The table is a file in the cache. A machine is a processor, its threads, the tier of the kernels and
the version of secateur; every time has its date.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from secateur.evaluation.random_matrices import another, random_matrix
from secateur.evaluation.token_times import LAYER_BYTES, Way, WayTimer, key_of
from secateur.models.samples import cache_folder
from secateur.progress import Progress
from secateur.runs.atomic import write_json
from secateur.runs.environment import environment
from secateur.runtime.kernels.dispatch import by_kernel
from secateur.runtime.kernels.library import kernel_info

__all__ = ["BASE", "MatrixTimes", "TimedMatrix", "time_matrices"]

Shape = tuple[int, int]

BASE = Way("int8", 0.0)
"""How linears are stored in the loop that is timed. Speed-ups are relative to it."""

LEAST_MATRICES, PASSES, TURNS = 2, 12, 6


@dataclass(frozen=True)
class TimedMatrix:
    """A matrix on this machine.

    Attributes:
        seconds: of its product with one token.
        measured: the date.
    """

    seconds: float
    measured: str


@dataclass(frozen=True)
class MatrixTimes:
    """Times of the linears of a model.

    Attributes:
        matrices: of each shape [out, in] and way.
        base: seconds of a token with all linears on `BASE`.
        base_matrices: of them, the linears.
    """

    matrices: Mapping[tuple[Shape, Way], TimedMatrix]
    base: float
    base_matrices: float

    @property
    def rest(self) -> float:
        """Seconds of a token outside the linears."""
        return self.base - self.base_matrices

    @property
    def measured(self) -> str:
        """The earliest date of a time."""
        return min(timed.measured for timed in self.matrices.values())

    def seconds(self, shape: Shape, way: Way) -> float:
        """Of a linear, for one token."""
        return self.matrices[shape, way].seconds


@torch.inference_mode()
def time_matrices(
    config: Any,
    shapes: Sequence[Shape],
    ways: Sequence[Way],
    progress: Progress,
    *,
    file: Path | None = None,
    timer: Callable[[Shape, Way, int], float] | None = None,
    loop: Callable[[Any, Way], float] | None = None,
) -> MatrixTimes:
    """Read the table, and time what it does not have yet.

    Args:
        config: of transformers, of a decoder of Llama's shape.
        shapes: [out, in] of every linear of the model, one entry for each linear.
        ways: to store them.
        progress: receives every matrix.
        file: the table; None for the file in the cache.
        timer: seconds of a matrix, one of so many; the kernels if not given.
        loop: seconds of a token with all linears stored one way; the decode loop if not given.

    Raises:
        ArchitectureError: our loop cannot decode such a model; says why.
    """
    file = file or cache_folder() / "matrix-times.json"
    counts = Counter(shapes)
    wanted = {entry_of(s, w): (s, w) for s in counts for w in dict.fromkeys([BASE, *ways])}
    table = read_table(file)
    loop_entry = f"token {key_of(config, BASE)}"
    missing = [name for name in (loop_entry, *wanted) if name not in table]
    progress.start("timing matrices", len(missing))
    for name in missing:
        if name == loop_entry:
            found = (loop or looped)(config, BASE)
        else:
            shape, way = wanted[name]
            found = (timer or timed)(shape, way, how_many(counts, shape, way))
        add_entry(file, name, TimedMatrix(found, date.today().isoformat()))
        progress.step(note=name)
    progress.finish()
    known = {name: TimedMatrix(**entry) for name, entry in read_table(file).items()}
    matrices = {key: known[name] for name, key in wanted.items()}
    whole = sum(matrices[shape, BASE].seconds * count for shape, count in counts.items())
    return MatrixTimes(matrices, known[loop_entry].seconds, whole)


def looped(config: Any, way: Way) -> float:
    """Seconds of a token in the decode loop, the lowest of all steps."""
    timer = WayTimer(config, way, pick=min)
    turns = [timer.turn() for _ in range(TURNS)]
    return min(turn.ends for turn in turns) + min(turn.layers for turn in turns)


def timed(shape: Shape, way: Way, count: int) -> float:
    """Seconds of one product with a matrix, one of so many different ones."""
    first = random_matrix(*shape, way.values, way.sparsity)
    matrices = [first, *(another(first) for _ in range(count - 1))]
    x = torch.randn(1, shape[1]).to(torch.bfloat16)
    least = [math.inf] * count
    for _ in range(PASSES):
        for number, matrix in enumerate(matrices):
            began = time.perf_counter()
            by_kernel(matrix, x)
            least[number] = min(least[number], time.perf_counter() - began)
    return statistics.mean(least)


def how_many(counts: Mapping[Shape, int], shape: Shape, way: Way) -> int:
    """Matrices of a shape that have as many bytes as the model's linears together."""
    whole = sum(rows * columns * count for (rows, columns), count in counts.items()) * way.bits / 8
    each = shape[0] * shape[1] * way.bits / 8
    return max(LEAST_MATRICES, round(min(whole, LAYER_BYTES) / each))


def machine() -> str:
    """What a time depends on besides the matrix."""
    here, kernels = environment(torch.device("cpu")), kernel_info()
    return f"{here['cpu']}, {kernels.threads} threads, {kernels.tier}, secateur {here['secateur']}"


def entry_of(shape: Shape, way: Way) -> str:
    """The name of a matrix in the table."""
    layout = f"bitmask with {way.sparsity:.0%} zeros" if way.sparsity else "dense"
    return f"{shape[0]} x {shape[1]}, {way.values}, {layout}, one token"


def read_table(file: Path) -> dict[str, Any]:
    """The times on this machine."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    of_machine: dict[str, Any] = known.get(machine(), {})
    return of_machine


def add_entry(file: Path, name: str, entry: TimedMatrix) -> None:
    """Write a time beside those that other processes may have written meanwhile."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    known.setdefault(machine(), {})[name] = asdict(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known)
