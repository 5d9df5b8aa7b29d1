"""What a fit pays with: bytes of files, bytes of memory, and seconds of a token.

Each kind of cost is a rest, which the model has whatever happens to its linears, and a cost of each
linear on each level:

| kind    | rest                                           | a linear                            |
|---------|------------------------------------------------|-------------------------------------|
| size    | headers, embeddings, norms                     | bytes of the target's files         |
| memory  | embeddings, norms, KV cache, working memory    | bytes that the kernels read         |
| seconds | attention, norms, embedding, head              | from the table of timed matrices    |

A size is always counted; memory and seconds are where they have a bound. A bound that no model can
keep is refused before any work, and the error names the nearest one that can be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secateur.engine.search.knapsack import Cost, Knapsack
from secateur.errors import ArchitectureError
from secateur.evaluation.random_models import WeightFormat
from secateur.evaluation.token_times import MatrixTimes, time_matrices
from secateur.models.shape import counted, memory_with
from secateur.models.skeleton import build_skeleton
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.recipes.options import bytes_of
from secateur.runtime.kernels.matrix import matrix_bytes
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting.storage_formats import (
    FILES,
    LEVELS,
    PACKED_FOLDER,
    StorageFormat,
    TargetFiles,
)

SIZE, MEMORY, SECONDS = "size", "memory", "seconds"

SHORT = {"bfloat16": "bf16", "int3": "int4"}
"""What values are called where they are timed; int3 is int4 in memory."""

MARGINS = {SIZE: 0.003, MEMORY: 0.01, SECONDS: 0.04}
"""Of a budget, kept free. A mix that is made has a few zeros more or fewer than its levels; time is
predicted from a table."""

LEAST_STEP = 0.01
"""By which a bound on seconds is tightened at least, as a fraction."""


@dataclass(frozen=True)
class CostKind:
    """One kind of cost.

    Attributes:
        name: size, memory or seconds.
        rest: of everything that is no linear.
        limit: the most that the whole model may cost; infinite for no bound.
    """

    name: str
    rest: float
    limit: float

    @property
    def budget(self) -> float:
        """What is left for the linears."""
        return self.limit - self.rest

    @property
    def aim(self) -> float:
        """The budget without its margin."""
        return self.budget * (1 - MARGINS[self.name])


@dataclass(frozen=True)
class Costs:
    """The kinds of cost of a model.

    Attributes:
        kinds: size, then memory and seconds if they are bounded.
        shapes: [out, in] of every linear, by its name.
        times: of the linears, if seconds are bounded.
        files: of the target.
    """

    kinds: tuple[CostKind, ...]
    shapes: Mapping[str, tuple[int, int]]
    times: MatrixTimes | None
    files: TargetFiles = PACKED_FOLDER

    @property
    def budget(self) -> Cost:
        """What all linears together may cost."""
        return tuple(kind.budget for kind in self.kinds)

    @property
    def aim(self) -> Cost:
        """What the search may spend on them."""
        return tuple(kind.aim for kind in self.kinds)

    @property
    def axis(self) -> int:
        """The kind that frontiers are drawn along: size, unless only seconds are bounded."""
        bounded = [place for place, kind in enumerate(self.kinds) if math.isfinite(kind.limit)]
        return bounded[-1] if bounded and self.kinds[bounded[-1]].name == SECONDS else 0

    @property
    def table(self) -> MatrixTimes:
        """The timed matrices; only with a bound on seconds."""
        assert self.times is not None
        return self.times

    @property
    def speedup(self) -> float:
        """The bound on seconds, as a speed-up over dense int8."""
        return self.table.base / self.kinds[-1].limit

    def predicted_speedup(self, formats: Mapping[str, StorageFormat]) -> float:
        """The speed-up over dense int8 that the table of times predicts."""
        linears = [self.of(name, stored)[-1] for name, stored in formats.items()]
        return self.table.base / (self.table.rest + sum(linears))

    def tightened(self, seconds: float) -> Costs | None:
        """The same with a lower bound on seconds; None if it is as low as it can be."""
        last = len(self.kinds) - 1
        now, least = self.kinds[last].limit, self.least(last)
        if least is None or least > now * (1 - LEAST_STEP):
            return None
        return self.limited(last, max(min(now, seconds), least))

    def of_another(self, other: Costs) -> Costs:
        """The costs of a cut of the model, with the limits of this one."""
        pairs = zip(other.kinds, self.kinds, strict=True)
        return replace(other, kinds=tuple(replace(a, limit=b.limit) for a, b in pairs))

    def narrowed(self, size: float) -> Costs:
        """The same with at most so many bytes for the linears."""
        return self.limited(0, min(self.kinds[0].limit, self.kinds[0].rest + size))

    def limited(self, place: int, limit: float) -> Costs:
        """The same with another limit of one kind."""
        kinds = [*self.kinds]
        kinds[place] = replace(kinds[place], limit=limit)
        return replace(self, kinds=tuple(kinds))

    @property
    def levels(self) -> tuple[StorageFormat, ...]:
        """The levels of every linear; the first is the model itself."""
        return self.files.levels

    @property
    def every(self) -> tuple[StorageFormat, ...]:
        """The levels, and the formats that a mix may have besides them."""
        return (*self.files.levels, *self.files.finer)

    @property
    def rest(self) -> Cost:
        """What everything that is no linear costs."""
        return tuple(kind.rest for kind in self.kinds)

    def of(self, name: str, stored: StorageFormat, size: float | None = None) -> Cost:
        """The cost of a linear.

        Args:
            name: of the linear.
            stored: how it is stored.
            size: its bytes in a packed folder, if its weights are known.
        """
        shape = self.shapes[name]
        found = {
            SIZE: lambda: self.files.linear(shape, stored, size),
            MEMORY: lambda: float(
                matrix_bytes(shape, stored.values, stored.sparsity, stored.group)
            ),
            SECONDS: lambda: self.table.seconds(shape, weight_format(stored)),
        }
        return tuple(found[kind.name]() for kind in self.kinds)

    def file_bytes(self, formats: Mapping[str, StorageFormat], sizes: Mapping[str, int]) -> int:
        """Bytes of the files of a whole model.

        Args:
            formats: how every linear is stored.
            sizes: the bytes of every linear in a packed folder.
        """
        linears = [self.of(name, one, float(sizes[name]))[0] for name, one in formats.items()]
        return round(self.rest[0] + sum(linears))

    def least(self, place: int, *, alone: bool = False) -> float | None:
        """The smallest cost of one kind that a whole model can have, within the other bounds.

        Args:
            place: of the kind.
            alone: without the other bounds.

        Returns:
            None if no model keeps the other bounds.
        """
        every = [[self.of(name, level) for level in self.levels] for name in self.shapes]
        others = tuple(math.inf if alone or n == place else most for n, most in enumerate(self.aim))
        wanted = tuple(tuple(level[place] for level in levels) for levels in every)
        knapsack = Knapsack(tuple(map(tuple, every)), wanted)
        candidate = knapsack.best(others)
        if candidate is None:
            return None
        kind = self.kinds[place]
        return kind.rest + knapsack.predicted(candidate) / (1 - MARGINS[kind.name])


def costs_of(recipe: FitRecipe, model: PackableCheckpoint, progress: Progress) -> Costs:
    """The kinds of cost that a recipe bounds, for a model or a cut of it.

    Args:
        recipe: the recipe.
        model: dense.
        progress: receives the matrices that are timed.

    Raises:
        ArchitectureError: the speed is bounded, and our loop cannot decode the model.
    """
    files = FILES[recipe.target]
    kinds = [CostKind(SIZE, files.rest(model), _limit(recipe.max_size))]
    times = None
    if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
        trust = recipe.trust_remote_code
        skeleton = build_skeleton(model.reader.folder, trust_remote_code=trust)
    if recipe.max_inference_memory is not None:
        shape = counted("", skeleton)
        held = memory_with(_resident_rest(model), shape, "cpu", 1, recipe.context_length)
        kinds.append(CostKind(MEMORY, held.total, _limit(recipe.max_inference_memory)))
    if recipe.decode_speedup is not None:
        times = time_linears(skeleton.config, model.shapes, progress)
        kinds.append(CostKind(SECONDS, times.rest, times.base / recipe.decode_speedup))
    return Costs(tuple(kinds), model.shapes, times, files)


def _limit(size: int | str | None) -> float:
    """A bound in bytes; infinite for none."""
    return math.inf if size is None else float(bytes_of(size))


def time_linears(
    config: Any, shapes: Mapping[str, tuple[int, int]], progress: Progress
) -> MatrixTimes:
    """The times of all linears on all levels, from the table of this machine.

    Raises:
        ArchitectureError: our loop cannot decode the model.
    """
    try:
        return time_matrices(config, list(shapes.values()), [*map(weight_format, LEVELS)], progress)
    except ArchitectureError as error:
        raise ArchitectureError(
            error.what, where="--decode-speedup", remedy="leave it out: other bounds are kept too"
        ) from error


def weight_format(stored: StorageFormat) -> WeightFormat:
    """How linears of a format are timed."""
    return WeightFormat(SHORT.get(stored.values, stored.values), stored.sparsity)


def _resident_rest(model: PackableCheckpoint) -> int:
    """Bytes in memory of the weights that are no linears: int8 embeddings, norms in bfloat16."""
    total = 0
    for name, entry in model.reader.entries.items():
        matrix = model.matrices.get(name)
        count = entry.size_bytes // entry.dtype.itemsize
        if matrix is None:
            total += 2 * count
        elif not matrix.prunable:
            total += count + 4 * entry.shape[0]
    return total
