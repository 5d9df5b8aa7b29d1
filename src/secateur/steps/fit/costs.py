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
from secateur.errors import ArchitectureError, RecipeError
from secateur.evaluation.random_models import WeightFormat
from secateur.evaluation.token_times import MatrixTimes, time_matrices
from secateur.models.checkpoint import CheckpointReader
from secateur.models.shape import counted, memory_with
from secateur.models.skeleton import build_skeleton
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.recipes.options import bytes_of
from secateur.runtime.kernels.matrix import matrix_bytes
from secateur.runtime.storage_plan import Matrices
from secateur.steps.fit.storage_formats import (
    FILES,
    LEVELS,
    PACKED_FOLDER,
    StorageFormat,
    TargetFiles,
    matrix_shape,
)

SIZE, MEMORY, SECONDS = "size", "memory", "seconds"

SHORT = {"bfloat16": "bf16", "int3": "int4"}
"""What values are called where they are timed; int3 is int4 in memory."""

MARGINS = {SIZE: 0.003, MEMORY: 0.01, SECONDS: 0.04}
"""Of a budget, kept free. A mix that is made has a few zeros more or fewer than its levels; time is
predicted from a table."""

OPTION_OF: Mapping[str, str] = {
    SIZE: "max_size",
    MEMORY: "max_inference_memory",
    SECONDS: "decode_speedup",
}
"""The option that bounds each kind of cost."""

NEAREST: Mapping[str, str] = {
    SIZE: "the smallest possible size is",
    MEMORY: "the smallest possible memory is",
    SECONDS: "the largest speed-up by the table of timed matrices is",
}


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
        kinds: size, then those that are bounded.
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

    def place(self, name: str) -> int | None:
        """The place of a kind; None if it is not counted."""
        return next((n for n, kind in enumerate(self.kinds) if kind.name == name), None)

    @property
    def speedup(self) -> float:
        """The bound on seconds, as a speed-up over dense int8; 0 without one."""
        place = self.place(SECONDS)
        if place is None or self.times is None:
            return 0.0
        return self.times.base / self.kinds[place].limit

    def of_another(self, other: Costs) -> Costs:
        """The costs of a cut of the model, with the limits of this one."""
        pairs = zip(other.kinds, self.kinds, strict=True)
        return replace(other, kinds=tuple(replace(a, limit=b.limit) for a, b in pairs))

    def narrowed(self, size: float) -> Costs:
        """The same with at most so many bytes for the linears."""
        first = self.kinds[0]
        return self.limited(0, min(first.limit, first.rest + size))

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
            SECONDS: lambda: self.seconds(shape, stored),
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

    def seconds(self, shape: tuple[int, int], stored: StorageFormat) -> float:
        """Of a linear, for one token."""
        assert self.times is not None
        return self.times.seconds(shape, weight_format(stored))

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


def costs_of(
    recipe: FitRecipe,
    reader: CheckpointReader,
    matrices: Matrices,
    progress: Progress,
) -> Costs:
    """The kinds of cost that a recipe bounds, for a model or a cut of it.

    Args:
        recipe: the recipe.
        reader: the model, dense.
        matrices: that can be packed, by stored name.
        progress: receives the matrices that are timed.

    Raises:
        ArchitectureError: the speed is bounded, and our loop cannot decode the model.
    """
    shapes = {m.linear: matrix_shape(reader, n, m) for n, m in matrices.items() if m.prunable}
    files = FILES[recipe.target]
    size = files.rest(reader, matrices)
    kinds = [CostKind(SIZE, size, _limit(recipe.max_size))]
    times = None
    if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
        model = build_skeleton(reader.folder, trust_remote_code=recipe.trust_remote_code)
    if recipe.max_inference_memory is not None:
        shape = counted("", model)
        held = memory_with(_resident_rest(reader, matrices), shape, "cpu", 1, recipe.context_length)
        kinds.append(CostKind(MEMORY, held.total, _limit(recipe.max_inference_memory)))
    if recipe.decode_speedup is not None:
        times = time_linears(model.config, shapes, progress)
        kinds.append(CostKind(SECONDS, times.rest, times.base / recipe.decode_speedup))
    return Costs(tuple(kinds), shapes, times, files)


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


def _resident_rest(reader: CheckpointReader, matrices: Matrices) -> int:
    """Bytes in memory of the weights that are no linears: int8 embeddings, norms in bfloat16."""
    total = 0
    for name, entry in reader.entries.items():
        matrix = matrices.get(name)
        count = entry.size_bytes // entry.dtype.itemsize
        if matrix is None:
            total += 2 * count
        elif not matrix.prunable:
            total += count + 4 * entry.shape[0]
    return total


def check_feasible(recipe: FitRecipe, costs: Costs, source: int) -> None:
    """Refuse a bound that no level can keep, and bounds that cannot be kept together.

    Args:
        recipe: gives the bounds.
        costs: of the model.
        source: bytes of the model's weight files.

    Raises:
        RecipeError: names the nearest bound that is possible.
    """
    bounded = [n for n, kind in enumerate(costs.kinds) if math.isfinite(kind.limit)]
    for alone in (True, False):
        for place in bounded:
            least = costs.least(place, alone=alone)
            if least is None or least > costs.kinds[place].limit:
                raise _impossible(recipe, costs, place, least, alone=alone)
    if bounded == [0] and recipe.max_loss_increase is None and costs.kinds[0].limit >= source:
        least = costs.least(0)
        assert least is not None
        raise RecipeError(
            f"the model has {source / 2**20:.1f}MiB, so it fits into {recipe.max_size} as it is",
            where="--max-size",
            remedy=f"leave it, or give a size from {as_option(costs, SIZE, least)} on",
        )


def _impossible(
    recipe: FitRecipe, costs: Costs, place: int, least: float | None, *, alone: bool
) -> RecipeError:
    """The error for a bound that cannot be kept; `least` is the smallest cost that can."""
    name = costs.kinds[place].name
    bounds = [OPTION_OF[kind.name] for kind in costs.kinds if math.isfinite(kind.limit)]
    others = " and ".join(option for option in bounds if option != OPTION_OF[name])
    if least is None:
        return RecipeError(
            f"no model keeps {others} together", where=OPTION_OF[name], remedy="leave one out"
        )
    given = getattr(recipe, OPTION_OF[name])
    fault = {
        SIZE: f"no level fits into {given}",
        MEMORY: f"no level runs in {given} with {recipe.context_length} tokens of context",
        SECONDS: f"no level decodes {given} times as fast as dense int8 on this machine",
    }[name]
    nearest = f"{NEAREST[name]} {as_option(costs, name, least)}"
    return RecipeError(
        fault + ("" if alone else f" with this {others}"),
        where=OPTION_OF[name],
        remedy=f"{nearest}; or cut the model first with `secateur structure`",
    )


def as_option(costs: Costs, name: str, value: float) -> str:
    """A cost in the form of the option that bounds it, rounded to the side that can be kept."""
    if name == SECONDS:
        assert costs.times is not None
        return f"{math.floor(100 * costs.times.base / value) / 100:g}"
    return f"{math.ceil(10 * value / 2**20) / 10:.1f}MiB"
