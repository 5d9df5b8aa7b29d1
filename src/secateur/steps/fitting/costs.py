"""What a fit pays with: bytes of files, bytes of memory, and seconds of a token.

Each kind of cost is a rest, which the model has whatever happens to its matrices, and a cost of
each linear, and of embedding and head, in each format:

| kind    | rest                              | a linear                         | embeddings  |
|---------|-----------------------------------|----------------------------------|-------------|
| size    | headers, norms                    | bytes of the target's files      | the same    |
| memory  | norms, KV cache, working memory   | bytes that the kernels read      | the same    |
| seconds | attention, norms, embedding, head | from the table of timed matrices | in the rest |

A size is always counted; memory and seconds are where they have a bound. A bound that no model can
keep is refused before any work, and the error names the nearest one that can be kept.

A linear of a pruned model keeps its zeros in every format; a format with more of them prunes it
further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.engine.search.knapsack import Cost, Knapsack
from secateur.errors import ArchitectureError
from secateur.evaluation.random_models import WeightFormat
from secateur.evaluation.token_times import MatrixTimes, time_head, time_matrices
from secateur.models.counting import counted
from secateur.models.shape import memory_with
from secateur.models.skeleton import build_skeleton
from secateur.progress import Progress
from secateur.recipes.compress import FitRecipe
from secateur.recipes.options import bytes_of
from secateur.runtime.kernels.matrix import matrix_bytes
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting.storage_formats import (
    EMBEDDINGS,
    FILES,
    FORMATS,
    PACKED_FOLDER,
    PackedFolder,
    StorageFormat,
    embedded,
)

SIZE, MEMORY, SECONDS = "size", "memory", "seconds"

SHORT = {"bfloat16": "bf16", "int3": "int4", "int2": "int4"}
"""What values are called where they are timed; int3 and int2 are int4 in memory."""

MARGINS = {SIZE: 0.005, MEMORY: 0.01, SECONDS: 0.04}
"""Of a budget, kept free. A model that is made has a few zeros more or fewer; time is predicted
from a table."""

FEWEST_ZEROS = 1 / 16
"""Of a linear, as a fraction; a bitmask takes more than fewer ones save in any format."""

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
    def aim(self) -> float:
        """What is left for the linears, without its margin."""
        return (self.limit - self.rest) * (1 - MARGINS[self.name])


@dataclass(frozen=True)
class Costs:
    """The kinds of cost of a model.

    Attributes:
        kinds: size, then memory and seconds if they are bounded.
        shapes: [out, in] of every linear, by its name.
        outer: [out, in] of embedding and head, by their names; one if they are tied.
        times: of the linears, if seconds are bounded.
        files: of the target.
        head: seconds of the output head beyond those in int8, by its values; where there are none,
            it takes the same in all.
        zeros: the fraction of zeros that linears have already, by their names.
    """

    kinds: tuple[CostKind, ...]
    shapes: Mapping[str, tuple[int, int]]
    outer: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    times: MatrixTimes | None = None
    files: PackedFolder = PACKED_FOLDER
    head: Mapping[str, float] = field(default_factory=dict)
    zeros: Mapping[str, float] = field(default_factory=dict)

    @property
    def units(self) -> list[str]:
        """What has a format of its own: the linears, then the embeddings."""
        return [*self.shapes, EMBEDDINGS]

    @property
    def aim(self) -> Cost:
        """What the search may spend on them."""
        return tuple(kind.aim for kind in self.kinds)

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
        taken = [self.of(name, stored)[-1] for name, stored in formats.items()]
        return self.table.base / (self.table.rest + sum(taken))

    def tightened(self, seconds: float) -> Costs | None:
        """The same with a lower bound on seconds; None if it is as low as it can be."""
        last = len(self.kinds) - 1
        now, least = self.kinds[last].limit, self.least(last)
        if least is None or least > now * (1 - LEAST_STEP):
            return None
        return self.limited(last, max(min(now, seconds), least))

    def limited(self, place: int, limit: float) -> Costs:
        """The same with another limit of one kind."""
        kinds = [*self.kinds]
        kinds[place] = replace(kinds[place], limit=limit)
        return replace(self, kinds=tuple(kinds))

    @property
    def formats(self) -> tuple[StorageFormat, ...]:
        """The formats of every unit; the first is the model itself."""
        return self.files.formats

    @property
    def rest(self) -> Cost:
        """What everything else costs."""
        return tuple(kind.rest for kind in self.kinds)

    def of(self, name: str, stored: StorageFormat, kept: float | None = None) -> Cost:
        """The cost of a unit in a format; `kept` is the fraction of nonzeros, if it is known."""
        if name == EMBEDDINGS:
            stored = StorageFormat(embedded(stored), 0.0)
            each = [self._of_matrix(one, shape, stored) for one, shape in self.outer.items()]
            if not each:
                return (0.0,) * len(self.kinds)
            whole = [sum(kind) for kind in zip(*each, strict=True)]
            if self.head:
                whole[-1] += self.head[stored.values]
            return tuple(whole)
        stored = replace(stored, sparsity=max(stored.sparsity, self.zeros.get(name, 0.0)))
        return self._of_matrix(name, self.shapes[name], stored, kept, timed=True)

    def pruned(self, name: str, stored: StorageFormat) -> float:
        """The fraction of the nonzero weights of a linear that a format prunes."""
        own = self.zeros.get(name, 0.0)
        return (stored.sparsity - own) / (1 - own) if stored.sparsity > own else 0.0

    def _of_matrix(
        self,
        name: str,
        shape: tuple[int, int],
        stored: StorageFormat,
        kept: float | None = None,
        *,
        timed: bool = False,
    ) -> Cost:
        """The cost of a matrix. Embedding and head are timed with the rest."""
        found = {
            SIZE: lambda: float(self.files.matrix(name, shape, stored, kept)),
            MEMORY: lambda: float(
                matrix_bytes(shape, stored.values, stored.sparsity, stored.group)
            ),
            SECONDS: lambda: self.table.seconds(shape, weight_format(stored)) if timed else 0.0,
        }
        return tuple(found[kind.name]() for kind in self.kinds)

    def least(self, place: int, *, alone: bool = False) -> float | None:
        """The smallest cost of one kind that a whole model can have, within the other bounds.

        Args:
            place: of the kind.
            alone: without the other bounds.

        Returns:
            None if no model keeps the other bounds.
        """
        every = tuple(
            tuple(self.of(name, stored) for stored in self.formats) for name in self.units
        )
        others = (math.inf if alone or n == place else most for n, most in enumerate(self.aim))
        knapsack = Knapsack(every, ((0.0,) * len(self.formats),) * len(every))
        candidate = knapsack.cheapest(place, (*others, math.inf))
        if candidate is None:
            return None
        kind = self.kinds[place]
        return kind.rest + knapsack.total(candidate)[place] / (1 - MARGINS[kind.name])


def costs_of(recipe: FitRecipe, model: PackableCheckpoint, progress: Progress) -> Costs:
    """The kinds of cost that a recipe bounds, for a model or a cut of it.

    Args:
        recipe: the recipe.
        model: dense, or pruned.
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
        others = [e for name, e in model.reader.entries.items() if name not in model.matrices]
        # In memory they are bfloat16.
        rest = sum(2 * entry.size_bytes // entry.dtype.itemsize for entry in others)
        held = memory_with(rest, shape, "cpu", 1, recipe.context_length)
        kinds.append(CostKind(MEMORY, held.total, _limit(recipe.max_inference_memory)))
    if recipe.decode_speedup is not None:
        times = time_linears(skeleton.config, model.shapes, progress)
        kinds.append(CostKind(SECONDS, times.rest, times.base / recipe.decode_speedup))
    outer = {
        name.removesuffix(".weight"): (rows, columns)
        for name, matrix in model.matrices.items()
        if not matrix.prunable
        for rows, columns in [model.reader.entries[name].shape]
    }
    shares = model.zero_fractions.items()
    # a linear without any weight left is counted as dense
    zeros = {name: share for name, share in shares if FEWEST_ZEROS <= share < 1}
    return Costs(tuple(kinds), model.shapes, outer, times, files, zeros=zeros)


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
        return time_matrices(config, list(shapes.values()), [*map(weight_format, TIMED)], progress)
    except ArchitectureError as error:
        raise ArchitectureError(
            error.what, where="--decode-speedup", remedy="leave it out: other bounds are kept too"
        ) from error


TIMED = [stored for stored in FORMATS if stored.sparsity in (0.0, 0.5, 0.7)]
"""The formats that are timed; the times of other sparsities lie between theirs."""


def weight_format(stored: StorageFormat) -> WeightFormat:
    """How linears of a format are timed."""
    return WeightFormat(SHORT.get(stored.values, stored.values), stored.sparsity)


def time_heads(shape: tuple[int, int]) -> dict[str, float]:
    """Seconds of an output head [out, in] beyond those in int8, by its values, from the table."""
    values = dict.fromkeys(map(embedded, FORMATS))
    seconds = {one: time_head(shape, weight_format(StorageFormat(one, 0.0))) for one in values}
    return {one: each - seconds["int8"] for one, each in seconds.items()}
