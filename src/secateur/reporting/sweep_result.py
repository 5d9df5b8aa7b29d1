"""What a sweep measured: perplexity against sparsity, as JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.evaluation.protocol import protocol_id
from secateur.reporting.wording import bare_name, percent

__all__ = ["SCHEMA", "PointKey", "SweepPoint", "SweepResult", "markdown_row", "read_sweep"]

SCHEMA = "secateur.sweep/1"
PointKey = tuple[str, str, float]


@dataclass(frozen=True)
class SweepPoint:
    """One pruned model, judged.

    Attributes:
        method: a famous name, or a preset.
        pattern: which zeros are allowed.
        sparsity: the fraction of zeros asked for.
        perplexity: by text.
        excess: ln(perplexity) − ln(dense perplexity), nats a token, by text.
        zeros: the fraction of zeros found in the decoder's matrices.
        seconds: of pruning.
        peak_resident_bytes: of pruning.
        notes: the folder that holds the notes of the run (`secateur/`), within that of the sweep.
        folder: the same if the weights are there too, else None.
    """

    method: str
    pattern: str
    sparsity: float
    perplexity: dict[str, float]
    excess: dict[str, float]
    zeros: float
    seconds: float
    peak_resident_bytes: int
    notes: str
    folder: str | None = None

    @property
    def key(self) -> PointKey:
        """By which points are told apart."""
        return self.method, self.pattern, round(self.sparsity, 6)


@dataclass
class SweepResult:
    """All that was measured so far.

    Attributes:
        model: what was pruned.
        conditions: everything all points have in common; a sweep that goes on has the same.
        environment: versions and hardware.
        dense: perplexity of the dense model, by text; empty before it was judged.
        protocol: of the perplexity, by text.
        calibration: where the windows are from; None if no method needs any.
        points: in the order they were asked for.
        failures: points that could not be had, and why.
    """

    model: str
    conditions: dict[str, Any]
    environment: dict[str, Any]
    dense: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    points: list[SweepPoint] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """What it was judged on."""
        return list(self.dense)

    def to_json(self) -> dict[str, Any]:
        """As `sweep.json` holds it."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "dense": {"perplexity": self.dense},
            "environment": self.environment,
            "conditions": self.conditions,
            "protocol": self.protocol,
            "calibration": self.calibration,
            "points": [asdict(point) for point in self.points],
            "failures": self.failures,
        }

    def rows(self) -> list[list[str]]:
        """A table for people: method, pattern, zeros, then each text, seconds and memory."""
        judged = (f"{self.dense[text]:.2f}" for text in self.texts)
        dense = ["dense", "", "", *judged, "", ""]
        return [dense, *(self.row(point) for point in self.points)]

    def row(self, point: SweepPoint) -> list[str]:
        """One line of that table; in brackets the excess loss."""
        judged = (f"{point.perplexity[t]:.2f} ({point.excess[t]:.3f})" for t in self.texts)
        size = f"{point.peak_resident_bytes / 2**30:.2f} GiB"
        zeros = percent(point.zeros, 1)
        return [point.method, point.pattern, zeros, *judged, f"{point.seconds:.0f} s", size]

    @property
    def columns(self) -> list[str]:
        """The heads of that table."""
        return ["method", "pattern", "zeros", *map(bare_name, self.texts), "time", "peak memory"]

    def markdown(self) -> str:
        """The table with what it takes to read it."""
        lines = [
            f"# {bare_name(self.model)}: perplexity against sparsity",
            "",
            "Made by `secateur sweep`. In brackets the excess loss, ln(perplexity) − ln(dense "
            "perplexity), in nats a token.",
            "",
            markdown_row(self.columns),
            "|---|---|" + "---:|" * (len(self.columns) - 2),
            *(markdown_row(row) for row in self.rows()),
            "",
        ]
        for failure in self.failures:
            lines += [f"- failed: {failure['method']}, {failure['pattern']}: {failure['what']}", ""]
        for text in self.texts:
            name = protocol_id("ppl", self.protocol[text])
            protocol = ", ".join(f"{k} {v}" for k, v in self.protocol[text].items())
            lines += [f"Perplexity on {bare_name(text)}, protocol `{name}`: {protocol}.", ""]
        if self.calibration:
            told = self.calibration
            lines += [
                f"Calibration: {told['samples']} windows of {told['sequence_length']} tokens of "
                f"{told['source']}, the same for all points.",
                "",
            ]
        told = self.environment
        lines.append(f"{told['cpu']}, {told['threads']} threads, torch {told['torch']}.")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line a point, numbers in full."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        judged = [name for t in self.texts for name in (f"perplexity {t}", f"excess {t}")]
        head = ["method", "pattern", "sparsity", "zeros", *judged, "seconds", "peak_resident_bytes"]
        writer.writerow(head)
        dense = [value for text in self.texts for value in (self.dense[text], 0.0)]
        writer.writerow(["dense", "", 0.0, "", *dense, "", ""])
        for p in self.points:
            own = [value for text in self.texts for value in (p.perplexity[text], p.excess[text])]
            writer.writerow(
                [p.method, p.pattern, p.sparsity, p.zeros, *own, p.seconds, p.peak_resident_bytes]
            )
        return stream.getvalue()


def markdown_row(cells: Sequence[str]) -> str:
    """Cells between bars; bars of their own are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def read_sweep(file: Path) -> SweepResult:
    """Read `sweep.json`.

    Raises:
        CheckpointError: it is damaged, or of another kind.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told.get("schema") != SCHEMA:
            raise CheckpointError(
                f"the schema is {told.get('schema')!r}, not {SCHEMA!r}",
                where=str(file),
                remedy="use the release of secateur that wrote it, or repeat the sweep",
            )
        result = SweepResult(
            told["model"],
            told["conditions"],
            told["environment"],
            told["dense"]["perplexity"],
            told["protocol"],
            told["calibration"],
            [SweepPoint(**point) for point in told["points"]],
            told["failures"],
        )
        for point in result.points:
            if not point.perplexity.keys() == point.excess.keys() == result.dense.keys():
                raise ValueError(f"{point.method} {point.pattern} was judged on other texts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"this is not the whole record of a sweep: {error}",
            where=str(file),
            remedy="remove the file and run the sweep again; pruned points are kept",
        ) from error
    return result
