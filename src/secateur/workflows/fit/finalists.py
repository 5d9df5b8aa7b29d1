"""The finalists of a fit: candidates made as real models, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

from secateur.engine.choose.budgeted import Menu
from secateur.engine.choose.fitting import FitSearch, Point
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Labelled
from secateur.reporting.results.fit import FitFinalist
from secateur.sparsity.evolution import Candidate
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.kinds import FINER, KINDS, LevelKind
from secateur.workflows.fit.levels import linear_bytes
from secateur.workflows.fit.making import Kinds, made
from secateur.workflows.fit.yardstick import Yardstick

__all__ = ["SINGLE", "Finalist", "finalists", "single"]

SEARCHED = "the search's choice"
SURVEYED = "the survey's choice"
QUANTIZED = "only rounded, mixed"
SINGLE = "the best single technique"

SLACK = 1.25
"""The search's choice is made only if its levels put together have at most so many times the
divergence of the best mix that was made. The search chooses levels that fit together, so making its
choice gains less than making that of the survey: 14 % against 34 % on SmolLM2 at 60 MiB."""


@dataclass(frozen=True)
class Finalist:
    """A model that was made whole.

    Attributes:
        base: the model before pruning: the source, or a cut of it.
        sparse: the model before rounding.
        folder: the model, pruned and rounded.
        kinds: how every linear is stored.
        told: its numbers, for the result.
        cut: the step of a chain that makes `base`; empty if nothing was cut.
    """

    base: Path
    sparse: Path
    folder: Path
    kinds: Kinds
    told: FitFinalist
    cut: Mapping[str, Any] = field(default_factory=dict)

    @property
    def only_rounded(self) -> bool:
        """Whether it has no zeros and no cut."""
        return not self.cut and not any(kind.sparsity for kind in self.kinds.values())


def finalists(
    ground: Ground,
    search: FitSearch,
    menu: Menu,
    winner: Point,
    budget: float,
    rest: int,
    measure: Yardstick,
) -> list[Finalist]:
    """Make and measure mixes, no mix twice: prune, then round, each linear in its own way.

    The search's choice is made last, and only if it may win (`SLACK`).

    Args:
        ground: of the fit.
        search: after the survey.
        menu: with finer sparsities (`finer`).
        winner: of the search.
        budget: bytes of all linears.
        rest: bytes of everything that is no linear.
        measure: measures on the windows that choose.
    """
    wanted = {
        QUANTIZED: search.menu.best(budget, search.allowed("quantize")),
        SURVEYED: menu.best(budget),
        SEARCHED: winner.candidate,
    }
    found: list[Finalist] = []
    made_already: list[Candidate] = []
    for name, candidate in wanted.items():
        best = min((one.told.divergence for one in found), default=inf)
        late = name == SEARCHED and winner.divergence > SLACK * best
        if candidate is None or len(set(candidate)) == 1 or candidate in made_already or late:
            continue
        made_already.append(candidate)
        found.append(finalist(ground, search, menu, name, candidate, rest, measure))
    return found


def finalist(
    ground: Ground,
    search: FitSearch,
    menu: Menu,
    name: str,
    candidate: Candidate,
    rest: int,
    measure: Yardstick,
) -> Finalist:
    """Make and measure the mix that `name` chose; the other arguments are those of `finalists`."""
    every = (*KINDS, *FINER)
    kinds = {n: every[level] for n, level in zip(search.names, candidate, strict=True)}
    sparse, folder = solved(ground, kinds, name)
    sizes = linear_bytes(CheckpointReader(folder), ground.matrices, kinds)
    told = FitFinalist(
        name=name,
        file_bytes=rest + sum(sizes.values()),
        predicted=menu.predicted(candidate),
        mixed=search.measured(candidate) if max(candidate) < len(KINDS) else None,
        divergence=measure.divergence(folder),
    )
    return Finalist(ground.reader.folder, sparse, folder, kinds, told)


def single(
    ground: Ground, search: FitSearch, points: Sequence[Point], rest: int, budget: float
) -> Finalist | None:
    """The best single level within a budget of the linears; it is made already."""
    fitting = [point for point in points if point.cost <= budget]
    best = min(fitting, key=lambda point: point.divergence, default=None)
    if best is None:
        return None
    size, found = rest + round(best.cost), best.divergence
    told = FitFinalist(SINGLE, size, best.predicted, found, found)
    kind = KINDS[best.candidate[0]]
    bare = KINDS.index(LevelKind("bfloat16", kind.sparsity))
    sparse, folder = (search.levels[n].level.reader.folder for n in (bare, best.candidate[0]))
    kinds = dict.fromkeys(search.names, kind)
    return Finalist(ground.reader.folder, sparse, folder, kinds, told)


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
