"""The finalists of a fit: candidates made as real models, packed, and measured as they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from secateur.engine.choose.budgeted import Cost, Menu, fits
from secateur.engine.choose.fitting import FitSearch, Point
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled
from secateur.reporting.results.fit import FitFinalist
from secateur.sparsity.evolution import Candidate
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import LevelKind
from secateur.workflows.fit.levels import linear_bytes
from secateur.workflows.fit.making import Kinds, made
from secateur.workflows.fit.yardstick import Yardstick

SEARCHED = "the search's choice"
SURVEYED = "the survey's choice"
QUANTIZED = "only rounded, mixed"
SINGLE = "the best single technique"


@dataclass(frozen=True)
class Finalist:
    """A model that was made whole.

    Attributes:
        base: the model before pruning: the source, or a cut of it.
        sparse: the model before rounding.
        folder: the model, pruned and rounded.
        packed: the same, packed: what is measured.
        kinds: how every linear is stored.
        told: its numbers, for the result.
        cut: the step of a chain that makes `base`; empty if nothing was cut.
    """

    base: Path
    sparse: Path
    folder: Path
    packed: Path
    kinds: Kinds
    told: FitFinalist
    cut: Mapping[str, Any] = field(default_factory=dict)

    @property
    def only_rounded(self) -> bool:
        """Whether it has no zeros and no cut."""
        return not self.cut and not any(kind.sparsity for kind in self.kinds.values())


def mixes(search: FitSearch, menu: Menu, winner: Point, budget: Cost) -> dict[str, Candidate]:
    """The mixes to make, by what chose them; no mix twice.

    Args:
        search: after the survey.
        menu: with finer sparsities (`finer`).
        winner: of the search.
        budget: of the search.
    """
    wanted = {
        SEARCHED: winner.candidate,
        QUANTIZED: search.menu.best(budget, search.allowed("quantize")),
        SURVEYED: menu.best(budget),
    }
    found: dict[str, Candidate] = {}
    for name, candidate in wanted.items():
        if candidate is not None and len(set(candidate)) > 1 and candidate not in found.values():
            found[name] = candidate
    return found


def finalists(
    ground: Ground,
    search: FitSearch,
    menu: Menu,
    chosen: Mapping[str, Candidate],
    measure: Yardstick,
    seconds: float,
) -> list[Finalist]:
    """Make and measure mixes: prune, then round, with the sparsity and the values of each linear.

    Args:
        ground: of the fit.
        search: after the survey.
        menu: with finer sparsities (`finer`).
        chosen: the mixes, by what chose them.
        measure: measures on the windows that choose.
        seconds: that one is expected to take, packed and judged.
    """
    found = []
    for name, candidate in chosen.items():
        if not ground.pace.allows(f"making {name}", seconds):
            continue
        every = ground.costs.every
        kinds = {n: every[level] for n, level in zip(search.names, candidate, strict=True)}
        sparse, folder = solved(ground, kinds, name)
        packed, divergence = measure.packed(sparse, folder, kinds)
        sizes = linear_bytes(CheckpointReader(folder), ground.matrices, kinds)
        told = FitFinalist(
            name=name,
            file_bytes=ground.costs.file_bytes(kinds, sizes),
            predicted=menu.predicted(candidate),
            mixed=search.measured(candidate) if max(candidate) < len(search.levels) else None,
            divergence=divergence,
        )
        found.append(Finalist(ground.reader.folder, sparse, folder, packed, kinds, told))
    return found


def single(
    ground: Ground, search: FitSearch, points: Sequence[Point], budget: Cost, measure: Yardstick
) -> Finalist | None:
    """The best single level within a budget of the linears; it is made already."""
    fitting = [point for point in points if fits(point.cost, budget)]
    best = min(fitting, key=lambda point: point.divergence, default=None)
    if best is None:
        return None
    levels = ground.costs.levels
    kind = levels[best.candidate[0]]
    bare = levels.index(LevelKind("bfloat16", kind.sparsity))
    sparse, folder = (search.levels[n].level.reader.folder for n in (bare, best.candidate[0]))
    kinds = dict.fromkeys(search.names, kind)
    packed, divergence = measure.packed(sparse, folder, kinds)
    size = round(ground.costs.rest[0] + best.cost[0])
    told = FitFinalist(SINGLE, size, best.predicted, best.divergence, divergence)
    return Finalist(ground.reader.folder, sparse, folder, packed, kinds, told)


def solved(ground: Ground, kinds: Kinds, name: str) -> tuple[Path, Path]:
    """Make a mix, unless an earlier run has. Return its folders before and after rounding."""
    told = "\n".join(f"{linear} {kind.name}" for linear, kind in sorted(kinds.items()))
    output = ground.work / "mixes" / f"{crc32(told.encode()):08x}"
    progress = Labelled(ground.progress, f"making {name}")
    return made(
        ground.recipe,
        ground.reader.folder,
        ground.matrices,
        kinds,
        ground.fitted,
        output,
        progress,
    )
