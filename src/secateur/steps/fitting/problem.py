"""What a fit solves: a format for every unit of a model, within the bounds of a recipe.

| target    | files                                            | embedding and head              |
|-----------|--------------------------------------------------|---------------------------------|
| cpu       | a packed folder: all formats, zeros by a bitmask | together int8, int4 or int3     |
| llama.cpp | a GGUF file: BF16, and types of 2 to 8 bits      | each has a type, as linears do  |

A GGUF file stores zeros like other weights, so formats with zeros are not offered for it. Its
experts of a layer are one tensor for each of gate, up and down, and have one type.

Each kind of cost is a rest, which the model has whatever happens to its matrices, and a cost of
each linear, and of embedding and head, in each format:

| kind    | rest                              | a linear                         | embeddings  |
|---------|-----------------------------------|----------------------------------|-------------|
| size    | headers, norms                    | bytes of the target's files      | the same    |
| memory  | norms, KV cache, working memory   | bytes that the kernels read      | the same    |
| seconds | attention, norms, embedding, head | from the table of timed matrices | in the rest |

A size is always counted; memory and seconds are where they have a bound. A linear of a pruned model
keeps its zeros in every format; a format with more of them prunes it further.

Costs of units add up exactly. So do predictions of what they lose: errors of different linears are
independent to second order. But linears of a whole model make up for each other, so it loses less,
or more where much is lost. So predictions are multiplied by what the models that were made have
lost, over what was predicted (`FitProblem.after`).

A bound that no model can keep is refused before any work, and the error names the nearest one that
can be kept.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from secateur.engine.search.knapsack import Cost, Knapsack
from secateur.errors import ArchitectureError, RecipeError
from secateur.evaluation.token_times import MatrixTimes, time_head, time_matrices
from secateur.models import checkpoint
from secateur.models.counting import counted
from secateur.models.shape import memory_with
from secateur.models.skeleton import build_skeleton
from secateur.progress import Progress
from secateur.quantization.blocks import TYPES, BlockGrid
from secateur.recipes.compress import FitRecipe
from secateur.recipes.options import bytes_of
from secateur.reporting.fit import FitFinalist, FitPoint
from secateur.runtime.formats import GRID_BITS, Layout, PartSpec, WeightFormat, formats
from secateur.runtime.kernels.matrix import matrix_bytes
from secateur.runtime.packed import header_bytes
from secateur.runtime.storage_plan import DENSE, MixedReader, PackableCheckpoint
from secateur.sparsity.allocation.divergence import ByDivergence
from secateur.sparsity.evolution import Candidate
from secateur.structured.choices import NO_CUTS, CutLosses

if TYPE_CHECKING:
    from secateur.models.gguf_file import GGUFSource

GROUP = 64
"""Values that share a scale."""

VALUES = ("bfloat16", "int8", "int4", "int3", "int2")
SPARSITIES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)

FORMATS = tuple(WeightFormat(values, share) for share in SPARSITIES for values in VALUES)
"""All formats of a linear; the first is the model itself."""

Formats = Mapping[str, WeightFormat]
"""How every linear is stored, and the embeddings, by their names."""

EMBEDDINGS = "embeddings"
"""What embedding and head are called among the linears."""

EMBEDDED: Mapping[str, str] = {"int4": "int4", "int3": "int3", "int2": "int3"}
"""The values that embedding and head take beside each format's; int8 beside all others."""

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

TIMED = [stored for stored in FORMATS if stored.sparsity in (0.0, 0.5, 0.7)]
"""The formats that are timed; the times of other sparsities lie between theirs."""


OF_256 = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
"""The types of llama.cpp for rows that are a multiple of 256 weights, largest first."""

OF_32 = ("q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")
"""The same for other multiples of 32."""


def embedded(stored: WeightFormat) -> str:
    """The values of embedding and head in a format. They have no zeros."""
    return EMBEDDED.get(stored.values, "int8")


def group_of(stored: WeightFormat) -> int | None:
    """Values that share a scale; None without a grid."""
    return GROUP if stored.values in GRID_BITS else None


def as_timed(stored: WeightFormat) -> WeightFormat:
    """How the linears of a format are timed."""
    return WeightFormat(SHORT.get(stored.values, stored.values), stored.sparsity)


@functools.cache
def _stored_bytes(name: str, layout: Layout, nonzeros: int) -> int:
    """Bytes of a matrix in a packed folder, with what the header says of it, at most."""
    packed = layout.coded or layout.format != DENSE
    parts = formats[layout.format].parts(layout, nonzeros)
    described = header_bytes(
        {f"{name}.{suffix}": spec for suffix, spec in parts.items()},
        {name: layout} if packed else {},
    )
    commas = 2  # after other layouts and checksums
    stored = sum(spec.nbytes for spec in parts.values())
    return stored + described - header_bytes({}, {}) + commas


class PackedFolder:
    """The files of a target: a packed folder.

    Attributes:
        formats: that it stores; the first is the model itself.
        exact: whether sizes are exact, and not the most that there can be.
        dtype: in which models are compared with the dense one; None for that of the model.
    """

    formats: tuple[WeightFormat, ...] = FORMATS
    exact: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype | None] = None

    def units(self, linears: Iterable[str], ends: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """What has a format of its own, by its name: one or several linears, and the embeddings."""
        return {**{name: (name,) for name in linears}, EMBEDDINGS: (EMBEDDINGS,)}

    def offered(self, columns: int, *, zeros: bool) -> tuple[WeightFormat, ...]:
        """The formats of a matrix with rows of so many weights, and perhaps with zeros."""
        return self.formats

    def rest(self, model: PackableCheckpoint) -> int:
        """Bytes of everything that is no linear and no embedding, at most: norms in bfloat16, and
        what the headers say of them.

        Raises:
            ArchitectureError: the target does not know this model.
        """
        files, names = dict[Path, dict[str, PartSpec]](), model.reader.files
        for name, entry in model.reader.entries.items():
            others = files.setdefault(entry.file, {})
            if name not in model.matrices:
                narrow = entry.dtype if entry.dtype.itemsize < 2 else torch.bfloat16
                others[name] = PartSpec(narrow, entry.shape)
        count = len(names)
        shards = [checkpoint.shard_name("secateur", number + 1, count) for number in range(count)]
        data = sum(spec.nbytes for others in files.values() for spec in others.values())
        return data + sum(header_bytes(others, {}, shards) for others in files.values())

    def matrix(
        self, name: str, shape: tuple[int, int], stored: WeightFormat, kept: float | None = None
    ) -> int:
        """Bytes of a matrix, at most: the smaller one of bitmask and dense.

        Args:
            name: of the matrix, without `.weight`.
            shape: [out, in].
            stored: how it is stored.
            kept: the fraction of nonzeros; None for all that are not pruned. A kept weight that
                rounds to zero is stored as a zero.
        """
        kept = 1 - stored.sparsity if kept is None else kept
        nonzeros = round(shape[0] * shape[1] * kept)
        names = (DENSE, "bitmask") if stored.sparsity else (DENSE,)
        layouts = [Layout(form, stored.values, shape, group=group_of(stored)) for form in names]
        return min(_stored_bytes(name, layout, nonzeros) for layout in layouts)

    def finish(self, folder: Path, progress: Progress) -> int:
        """Write what the target needs besides the packed folder; the bytes of its weight files."""
        return sum(file.stat().st_size for file in checkpoint.shard_files(folder))

    def read_back(self, folder: Path, model: PackableCheckpoint) -> MixedReader | None:
        """The weights that the target's file has; None if the packed folder itself is judged."""
        return None

    def types(self, folder: Path) -> dict[str, str]:
        """The types of the matrices in a GGUF file, by the names of its tensors."""
        return {}


class GGUFFolder(PackedFolder):
    """A packed folder and a GGUF file in it, which is what counts."""

    formats = tuple(WeightFormat(values, 0.0) for values in ("bfloat16", *OF_256, *OF_32))
    exact = True
    dtype = torch.float32  # no other has the numbers of blocks

    def units(self, linears: Iterable[str], ends: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The experts of a layer together; embedding and head alone."""
        stacks = dict[str, list[str]]()
        for name in (*linears, *ends):
            stacks.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
        return {stack: tuple(names) for stack, names in stacks.items()}

    def offered(self, columns: int, *, zeros: bool) -> tuple[WeightFormat, ...]:
        """The types with whole blocks; where there are zeros, those with an exact 0."""
        names = next((own for own in (OF_256, OF_32) if columns % TYPES[own[-1]].block == 0), ())
        allowed = [name for name in names if not zeros or BlockGrid(name).exact_zero]
        return tuple(WeightFormat(values, 0.0) for values in ("bfloat16", *allowed))

    def rest(self, model: PackableCheckpoint) -> int:
        """Norms in float32, the vocabulary, headers; exact."""
        from secateur.exporting import ExportSource
        from secateur.exporting.gguf.writing import NEAREST, GGUFFile

        bare, ends = self.formats[0], model.ends
        whole = GGUFFile(ExportSource(model.reader), NEAREST[bare.values]).nbytes()
        shapes = {**model.shapes, **ends}
        for names in self.units(model.shapes, ends).values():
            out, into = shapes[names[0]]
            whole -= self.matrix("", (len(names) * out, into), bare)
        return whole

    def matrix(
        self, name: str, shape: tuple[int, int], stored: WeightFormat, kept: float | None = None
    ) -> int:
        """Rows of blocks."""
        from secateur.exporting.gguf.writing import GGUFFile

        return GGUFFile.matrix_bytes(shape, stored.values)

    def finish(self, folder: Path, progress: Progress) -> int:
        """Export every matrix in the type in which it is stored: `model-stored.gguf`."""
        from secateur.exporting import ExportSource
        from secateur.exporting.gguf import GGUF
        from secateur.runtime.install import open_checkpoint

        source = ExportSource(open_checkpoint(folder))
        return GGUF().write(source, "stored", folder, progress).file_bytes

    def read_back(self, folder: Path, model: PackableCheckpoint) -> MixedReader | None:
        """The model with the matrices of the file."""
        from secateur.exporting.gguf.like import FileLayout

        return FileLayout.written(self.written(folder), model).weights()

    def written(self, folder: Path) -> GGUFSource:
        """The file in a folder."""
        from secateur.models.gguf_file import GGUFSource

        return GGUFSource.read(min(folder.glob("*.gguf")))

    def types(self, folder: Path) -> dict[str, str]:
        """The types of the matrices in a GGUF file, by the names of its tensors."""
        tensors = self.written(folder).tensors.values()
        return {one.name: one.type.name for one in tensors if len(one.shape) > 1}


PACKED_FOLDER, GGUF_FILE = PackedFolder(), GGUFFolder()

FILES: dict[str, PackedFolder] = {"cpu": PACKED_FOLDER, "llama.cpp": GGUF_FILE}
"""The files of the targets that a fit can serve."""


@dataclass(frozen=True)
class CostKind:
    """One kind of cost.

    Attributes:
        name: size, memory or seconds.
        rest: of everything that is no linear.
        limit: the most that the whole model may cost; infinite for no bound.
        exact: whether it needs no margin.
    """

    name: str
    rest: float
    limit: float
    exact: bool = False

    @property
    def share(self) -> float:
        """The part of a budget that may be spent: what is left without its margin."""
        return 1 - MARGINS[self.name] * (not self.exact)

    @property
    def aim(self) -> float:
        """What is left for the linears, without its margin."""
        return (self.limit - self.rest) * self.share


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

    @functools.cached_property
    def members(self) -> dict[str, tuple[str, ...]]:
        """The linears of every unit, or its embedding and head; each unit has one format."""
        return self.files.units(self.shapes, self.outer)

    @property
    def units(self) -> list[str]:
        """What has a format of its own."""
        return [*self.members]

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats of all units; the first is the model itself."""
        return self.files.formats

    def offered(self, unit: str) -> tuple[WeightFormat, ...]:
        """The formats of a unit, as many as of any; where it has fewer, the first fills up."""
        first, *_ = names = self.members[unit]
        _, columns = {EMBEDDINGS: (0, 0), **self.outer, **self.shapes}[first]
        own = self.files.offered(columns, zeros=any(name in self.zeros for name in names))
        return own + own[:1] * (len(self.formats) - len(own))

    def ends_in(self, formats: Formats) -> str:
        """How embedding and head are stored, for people."""
        if EMBEDDINGS in formats:
            return embedded(formats[EMBEDDINGS])
        return ", ".join(formats[name].name for name in self.outer)

    def with_timed_head(self) -> Costs:
        """The same with seconds of the output head, from the table."""
        *_, shape = self.outer.values()
        values = dict.fromkeys(map(embedded, FORMATS))
        seconds = {one: time_head(shape, as_timed(WeightFormat(one, 0.0))) for one in values}
        return replace(self, head={one: x - seconds["int8"] for one, x in seconds.items()})

    @property
    def aim(self) -> Cost:
        """What the search may spend on the units."""
        return tuple(kind.aim for kind in self.kinds)

    @property
    def rest(self) -> Cost:
        """What everything else costs."""
        return tuple(kind.rest for kind in self.kinds)

    @property
    def table(self) -> MatrixTimes:
        """The timed matrices; only with a bound on seconds."""
        assert self.times is not None
        return self.times

    def predicted_speedup(self, stored: Formats) -> float:
        """The speed-up over dense int8 that the table of times predicts."""
        taken = sum(self.of(name, own)[-1] for name, own in stored.items())
        return self.table.base / (self.table.rest + taken)

    def limited(self, place: int, limit: float) -> Costs:
        """The same with another limit of one kind."""
        kinds = [*self.kinds]
        kinds[place] = replace(kinds[place], limit=limit)
        return replace(self, kinds=tuple(kinds))

    def of(self, name: str, stored: WeightFormat, kept: float | None = None) -> Cost:
        """The cost of a unit in a format; `kept` is the fraction of nonzeros, if it is known."""
        if name == EMBEDDINGS:
            stored = WeightFormat(embedded(stored), 0.0)
            each = [self._of_matrix(one, shape, stored) for one, shape in self.outer.items()]
            if not each:
                return (0.0,) * len(self.kinds)
            whole = [sum(kind) for kind in zip(*each, strict=True)]
            if self.head:
                whole[-1] += self.head[stored.values]
            return tuple(whole)
        stored = replace(stored, sparsity=max(stored.sparsity, self.zeros.get(name, 0.0)))
        first, *_ = names = self.members[name]
        out, into = self.shapes[first] if first in self.shapes else self.outer[first]
        return self._of_matrix(name, (len(names) * out, into), stored, kept, timed=True)

    def pruned(self, name: str, stored: WeightFormat) -> float:
        """The fraction of the nonzero weights of a linear that a format prunes."""
        own = self.zeros.get(name, 0.0)
        return (stored.sparsity - own) / (1 - own) if stored.sparsity > own else 0.0

    def _of_matrix(
        self,
        name: str,
        shape: tuple[int, int],
        stored: WeightFormat,
        kept: float | None = None,
        *,
        timed: bool = False,
    ) -> Cost:
        """The cost of a matrix. Embedding and head are timed with the rest."""
        found = list[float]()
        for kind in self.kinds:
            if kind.name == SIZE:
                found.append(float(self.files.matrix(name, shape, stored, kept)))
            elif kind.name == MEMORY:
                group = group_of(stored)
                found.append(float(matrix_bytes(shape, stored.values, stored.sparsity, group)))
            else:
                found.append(self.table.seconds(shape, as_timed(stored)) if timed else 0.0)
        return tuple(found)

    def least(self, place: int, *, alone: bool = False) -> float | None:
        """The smallest cost of one kind that a whole model can have, within the other bounds.

        Args:
            place: of the kind.
            alone: without the other bounds.

        Returns:
            None if no model keeps the other bounds.
        """
        every = tuple(tuple(self.of(unit, x) for x in self.offered(unit)) for unit in self.units)
        others = (math.inf if alone or n == place else most for n, most in enumerate(self.aim))
        knapsack = Knapsack(every, ((0.0,) * len(self.formats),) * len(every))
        candidate = knapsack.cheapest(place, (*others, math.inf))
        if candidate is None:
            return None
        kind = self.kinds[place]
        return kind.rest + knapsack.total(candidate)[place] / kind.share


def costs_of(recipe: FitRecipe, model: PackableCheckpoint, progress: Progress) -> Costs:
    """The kinds of cost that a recipe bounds, for a model or a cut of it.

    Args:
        recipe: the recipe.
        model: dense, or pruned.
        progress: receives the matrices that are timed.

    Raises:
        ArchitectureError: the speed is bounded, and our loop cannot decode the model.
    """
    files, reader = FILES[recipe.target], model.reader
    size = CostKind(SIZE, files.rest(model), _limit(recipe.max_size), files.exact)
    kinds, times = [size], None
    if recipe.max_inference_memory is not None or recipe.decode_speedup is not None:
        skeleton = build_skeleton(reader.folder)
    if recipe.max_inference_memory is not None:
        others = [e for name, e in reader.entries.items() if name not in model.matrices]
        rest = sum(2 * entry.size_bytes // entry.dtype.itemsize for entry in others)  # bfloat16
        held = memory_with(rest, counted("", skeleton), "cpu", 1, recipe.context_length)
        kinds.append(CostKind(MEMORY, held.total, _limit(recipe.max_inference_memory)))
    if recipe.decode_speedup is not None:
        times = time_linears(skeleton.config, model.shapes, progress)
        kinds.append(CostKind(SECONDS, times.rest, times.base / recipe.decode_speedup))
    shares = model.zero_fractions.items()
    # a linear without any weight left is counted as dense
    zeros = {name: share for name, share in shares if FEWEST_ZEROS <= share < 1}
    return Costs(tuple(kinds), model.shapes, model.ends, times, files, zeros=zeros)


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
        return time_matrices(config, list(shapes.values()), [*map(as_timed, TIMED)], progress)
    except ArchitectureError as error:
        raise ArchitectureError(
            error.what, where="--decode-speedup", remedy="leave it out: other bounds are kept too"
        ) from error


HALF = 0.5

KEPT = 0.5
"""What zeros take off the cost of rounding, by their fraction."""

POINTS = 12
"""Sizes of the predicted frontier, from the smallest to the largest, each larger by one factor."""


@dataclass(frozen=True)
class UnitLosses:
    """What the survey has measured (`fitting.survey`).

    For llama.cpp, embedding and head are among the linears.

    Attributes:
        rounded: the divergence of each linear rounded to `survey.PROBE`, nats per token.
        pruned: of each linear with half of its nonzero weights.
        coarser: the squared error of each linear rounded to the nearest, over that of `PROBE`, by
            values.
        kept: the fraction of nonzeros of each linear, by the names of formats with zeros.
        embeddings: the divergence with embedding and head in these values.
        cuts: what experts and neurons cost; nothing where they may not go.
    """

    rounded: dict[str, float]
    pruned: dict[str, float]
    coarser: dict[str, dict[str, float]]
    kept: dict[str, dict[str, float]]
    embeddings: dict[str, float]
    cuts: CutLosses = NO_CUTS

    def rise(self, name: str, stored: WeightFormat, share: float) -> float:
        """What a unit adds to the divergence in a format that prunes a share of its weights."""
        if name == EMBEDDINGS:
            return self.embeddings[embedded(stored)]
        rounding = self.rounded[name] * self.coarser[name].get(stored.values, 0.0)
        # a linear with half of its weights was measured; the logarithm grows evenly with the share
        pruning = (
            self.pruned[name] * math.exp(ByDivergence.growth * (share - HALF)) if share else 0.0
        )
        return rounding * (1 - KEPT * share) + pruning


@dataclass(frozen=True)
class FitProblem:
    """The choice of a format for every unit, by what each costs and is predicted to lose.

    Attributes:
        costs: of the units, and the bounds.
        losses: what was measured of single units.
        scale: by which they are multiplied.
        base: the divergence of the model before its units lose anything: that of a cut.
    """

    costs: Costs
    losses: UnitLosses
    scale: float = 1.0
    base: float = 0.0

    @functools.cached_property
    def knapsack(self) -> Knapsack:
        """The same as numbers alone."""
        costs, cost, rise = self.costs, [], []
        for name in costs.units:
            kept, offered = self.losses.kept.get(name, {}), costs.offered(name)
            cost.append(tuple(costs.of(name, x, kept.get(x.name)) for x in offered))
            rises = (
                sum(self.losses.rise(one, x, costs.pruned(one, x)) for one in costs.members[name])
                for x in offered
            )
            rise.append(tuple(self.scale * each for each in rises))
        return Knapsack(tuple(cost), tuple(rise))

    @property
    def without_zeros(self) -> list[int]:
        """The numbers of the formats without zeros."""
        return [n for n, stored in enumerate(self.costs.formats) if not stored.sparsity]

    def formats(self, candidate: Candidate) -> Formats:
        """The format of every linear, and of the embeddings, by their names."""
        costs, chosen = self.costs, zip(self.costs.units, candidate, strict=True)
        return {
            name: costs.offered(unit)[number]
            for unit, number in chosen
            for name in costs.members[unit]
        }

    def mix(self, less: float) -> Candidate | None:
        """The best formats within the bounds; None if none fits.

        Args:
            less: the mix has zeros only if it is predicted to lose less than so much of what the
                best one without zeros loses.
        """
        aim = self.costs.aim
        rounded, mixed = self.knapsack.best(aim, self.without_zeros), self.knapsack.best(aim)
        if rounded is None or mixed is None:
            return mixed
        pays = self.knapsack.predicted(mixed) < less * self.knapsack.predicted(rounded)
        return mixed if pays else rounded

    def smallest(self, bound: float) -> float:
        """The smallest size of the whole model with a predicted divergence within a bound."""
        aim = self.costs.aim
        candidate = self.knapsack.cheapest(0, (*aim, bound))
        size = aim[0] if candidate is None else self.knapsack.total(candidate)[0]
        return self.costs.rest[0] + min(size, self.knapsack.most[0]) / self.costs.kinds[0].share

    @property
    def frontier(self) -> tuple[FitPoint, ...]:
        """What is predicted for some sizes: of all formats, and of rounding alone."""
        knapsack, found = self.knapsack, list[FitPoint]()
        least, most = knapsack.least[0], knapsack.most[0]
        free = [math.inf] * (len(self.costs.kinds) - 1)
        kinds = {"all formats": None, "only rounded": self.without_zeros}
        if len(self.without_zeros) == len(self.costs.formats):
            kinds.pop("only rounded")
        for name, allowed in kinds.items():
            seen = set[Candidate]()
            for step in range(POINTS):
                budget = least * (most / least) ** (step / (POINTS - 1))
                candidate = knapsack.best((budget, *free), allowed)
                if candidate is not None and candidate not in seen:
                    seen.add(candidate)
                    size = round(self.costs.rest[0] + budget)
                    found.append(FitPoint(name, size, knapsack.predicted(candidate)))
        return tuple(found)

    def limited(self, limit: float) -> FitProblem:
        """The same with another limit on the size."""
        return replace(self, costs=self.costs.limited(0, limit))

    def tightened(self, seconds: float) -> FitProblem | None:
        """The same with a lower bound on seconds; None if it is as low as it can be."""
        costs, last = self.costs, len(self.costs.kinds) - 1
        now, least = costs.kinds[last].limit, costs.least(last)
        if least is None or least > now * (1 - LEAST_STEP):
            return None
        return replace(self, costs=costs.limited(last, max(min(now, seconds), least)))

    def after(self, made: FitFinalist) -> FitProblem:
        """The same after a model was made, and lost more or less than predicted."""
        predicted, lost = made.predicted - self.base, made.divergence - self.base
        if min(predicted, lost) <= 0:
            return self
        return replace(self, scale=self.scale * lost / predicted)


OPTION_OF: Mapping[str, str] = {
    SIZE: "max_size",
    MEMORY: "max_inference_memory",
    SECONDS: "decode_speedup",
}
"""The option that bounds each kind of cost."""

_REFUSED: Mapping[str, tuple[str, str]] = {
    SIZE: ("fits into {0}", "the smallest possible size is"),
    MEMORY: ("runs in {0} with {1} tokens of context", "the smallest possible memory is"),
    SECONDS: (
        "decodes {0} times as fast as dense int8 on this machine",
        "the largest speed-up by the table of timed matrices is",
    ),
}
"""What no model does, and how the nearest bound is called."""


def check_feasible(recipe: FitRecipe, costs: Costs, source: int) -> None:
    """Refuse a bound that no model can keep, and bounds that cannot be kept together.

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
        nearest = as_option(costs, SIZE, costs.least(0) or 0.0)
        raise RecipeError(
            f"the model has {source / 2**20:.1f}MiB, so it fits into {recipe.max_size} as it is",
            where="--max-size",
            remedy=f"leave it, or give a size from {nearest} on",
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
    fault, nearest = _REFUSED[name]
    fault = fault.format(getattr(recipe, OPTION_OF[name]), recipe.context_length)
    return RecipeError(
        f"no model {fault}" + ("" if alone else f" with this {others}"),
        where=OPTION_OF[name],
        remedy=f"{nearest} {as_option(costs, name, least)}; or cut the model first with "
        "`secateur structure`",
    )


def as_option(costs: Costs, name: str, value: float) -> str:
    """A cost in the form of the option that bounds it, rounded to the side that can be kept."""
    if name == SECONDS:
        return f"{math.floor(100 * costs.table.base / value) / 100:g}"
    unit, size = ("KiB", 2**10) if value < 2**20 else ("MiB", 2**20)
    return f"{math.ceil(10 * value / size) / 10:.1f}{unit}"
