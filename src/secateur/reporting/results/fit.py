"""What `fit` returns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.engine.choose.fitting import Point
from secateur.errors import CheckpointError
from secateur.reporting.charts import LineChart, Mark, Series
from secateur.reporting.results.compress import CompressResult
from secateur.reporting.results.next_steps import after_a_packed_folder
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table, mib

__all__ = ["FitLoss", "FitResult"]

FAMILIES = {"quantize": "rounded", "prune": "pruned", "both": "pruned and rounded"}


@dataclass(frozen=True)
class FitLoss:
    """A candidate on text that neither made nor chose it.

    Attributes:
        cost: bytes of its linears.
        loss_increase: above the dense model, in nats per token.
    """

    cost: float
    loss_increase: float


@dataclass(frozen=True)
class FitResult(Result):
    """The winner of a fit, and what it won against.

    Attributes:
        output: folder of the packed winner.
        max_bytes: the bound on the weight files; None for none.
        max_loss_increase: the bound; None for none.
        levels: names of the levels.
        level_of: the level of each linear, by its name.
        winner: the candidate.
        singles: every level alone.
        frontier: the best candidates for some budgets, of all levels and of rounding alone.
        losses: of the winner and its rivals, on the judged windows.
        rest: predicted bytes of everything that is no linear, at most.
        packed: sizes of what was written.
        seconds: wall time.
    """

    output: Path
    max_bytes: int | None
    max_loss_increase: float | None
    levels: tuple[str, ...]
    level_of: Mapping[str, int]
    winner: Point
    singles: tuple[Point, ...]
    frontier: tuple[Point, ...]
    losses: Mapping[str, FitLoss]
    rest: int
    packed: CompressResult
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        told = {name: getattr(self, name) for name in ("max_bytes", "max_loss_increase", "rest")}
        return {
            "output": str(self.output),
            **told,
            "levels": list(self.levels),
            "level_of": dict(self.level_of),
            "winner": asdict(self.winner),
            "singles": [asdict(point) for point in self.singles],
            "frontier": [asdict(point) for point in self.frontier],
            "losses": {name: asdict(loss) for name, loss in self.losses.items()},
            "packed": self.packed.to_json(),
            "seconds": self.seconds,
        }

    @classmethod
    def read(cls, file: Path) -> FitResult:
        """The result of a finished run.

        Raises:
            CheckpointError: the file is damaged, or of another release.
        """
        try:
            return cls.of(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"no fit of this release: {type(error).__name__}: {error}",
                where=str(file),
                remedy="fit the model again",
            ) from error

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> FitResult:
        """The result that `to_json` told."""

        def point(stored: dict[str, Any]) -> Point:
            return Point(**{**stored, "candidate": tuple(stored["candidate"])})

        return cls(
            **{
                **told,
                "output": Path(told["output"]),
                "levels": tuple(told["levels"]),
                "winner": point(told["winner"]),
                "singles": tuple(map(point, told["singles"])),
                "frontier": tuple(map(point, told["frontier"])),
                "losses": {name: FitLoss(**loss) for name, loss in told["losses"].items()},
                "packed": CompressResult.from_json(told["packed"]),
            }
        )

    def chart(self) -> LineChart:
        """Size against divergence: the frontiers, the single levels by family, and the winner."""

        def marks(points: Sequence[Point]) -> tuple[Mark, ...]:
            return tuple(
                Mark((self.rest + p.cost) / 2**20, p.divergence, p.name, self.told(p))
                for p in points
            )

        single = {
            family: [p for p in self.singles if p.families == family]
            for family in dict.fromkeys(p.families for p in self.singles)
        }
        mixed = [p for p in self.frontier if p.families == "all"]
        rounded = [p for p in self.frontier if p.families == "quantize"]
        return LineChart(
            "frontier",
            "Size against divergence from the dense model",
            "weight files, MiB",
            "nats per token",
            (
                Series("mixed levels", marks(mixed)),
                Series("mixed, only rounded", marks(rounded)),
                *(
                    Series(f"every linear alike, {FAMILIES[family]}", marks(points), joined=False)
                    for family, points in single.items()
                ),
                Series("the winner", marks([self.winner]), joined=False),
            ),
            log_y=all(p.divergence > 0 for p in (*self.singles, *mixed, *rounded, self.winner)),
            note="Lower is better, and so is further left. Divergence on the windows that choose.",
        )

    def told(self, point: Point) -> str:
        """A candidate in words."""
        name = point.name or f"a mix ({point.families})"
        size = mib(self.rest + point.cost)
        return f"{name}: {size}, {point.divergence:.4g} nats per token"

    @property
    def broken(self) -> list[str]:
        """Bounds that the measured result does not keep."""
        found = []
        if self.max_bytes is not None and self.packed.file_bytes > self.max_bytes:
            found.append(
                f"the weight files have {self.packed.file_bytes:,} bytes, {self.max_bytes:,} were "
                "allowed"
            )
        winner = self.losses["winner"].loss_increase
        if self.max_loss_increase is not None and winner > self.max_loss_increase:
            found.append(
                f"the loss rises by {winner:.4f} nats on text that did not choose, "
                f"{self.max_loss_increase:g} were allowed"
            )
        return found

    def blocks(self) -> Sequence[Block]:
        """The winner, its rivals, the frontier, and the next commands."""
        kinds = Counter(self.levels[level] for level in self.level_of.values())
        facts = [
            ("weight files", mib(self.packed.file_bytes)),
            ("predicted at most", mib(self.rest + self.winner.cost)),
            ("loss", f"{self.losses['winner'].loss_increase:+.4f} nats per token"),
            ("linears", ", ".join(f"{n} {name}" for name, n in kinds.most_common())),
            ("time", f"{self.seconds:.0f} s"),
            ("output", str(self.output)),
        ]
        rivals = [
            (name, mib(self.rest + loss.cost), f"{loss.loss_increase:+.4f}")
            for name, loss in self.losses.items()
        ]
        points = sorted((*self.singles, *self.frontier), key=lambda p: p.cost)
        rows = [
            (p.name or f"mixed ({p.families})", mib(self.rest + p.cost), f"{p.divergence:.4f}")
            for p in points
        ]
        blocks: list[Block] = [
            Table.facts("the winner", facts),
            Table.of("on text that neither made nor chose them", ("", "size", "loss"), rivals),
            Table.of("the frontier", ("", "size", "divergence, nats per token"), rows),
            *(Line(fault, "bold red") for fault in self.broken),
        ]
        return blocks + after_a_packed_folder(self.output, None)
