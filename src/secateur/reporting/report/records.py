"""ReportedRun folders and sweep folders, read for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import SourceError
from secateur.reporting.results.sweep import SweepResult
from secateur.runs.evaluation import FILE_NAME, EvaluationRecord, read_evaluation
from secateur.runs.records import (
    AnyRecord,
    Bench,
    Compression,
    DiagnosisRecord,
    Layer,
    Manifest,
    Sweep,
    parsed,
    read_record,
)

__all__ = ["Records", "ReportedRun", "ReportedSweep", "read_records"]


@dataclass(frozen=True)
class ReportedRun:
    """A pruned model, and everything that was measured of it.

    Attributes:
        name: what the page calls it; differs from run to run.
        folder: where it lies.
        manifest: how it was made.
        recipe: the same as YAML; empty if the folder has none.
        layers: what was done to each layer.
        evaluation: how good it is, if that was measured.
        diagnosis: what is wrong with it, if that was looked for.
        bench: how fast it is, if that was measured.
        compression: how much smaller it is, if it was compressed.
    """

    name: str
    folder: Path
    manifest: Manifest
    recipe: str = ""
    layers: tuple[Layer, ...] = ()
    evaluation: EvaluationRecord | None = None
    diagnosis: DiagnosisRecord | None = None
    bench: Bench | None = None
    compression: Compression | None = None


@dataclass(frozen=True)
class ReportedSweep:
    """A sweep.

    Attributes:
        name: what the page calls it.
        result: all that it measured.
    """

    name: str
    result: SweepResult


@dataclass(frozen=True)
class Records:
    """All that a report is about."""

    runs: tuple[ReportedRun, ...]
    sweeps: tuple[ReportedSweep, ...]


def read_records(places: Sequence[Path]) -> Records:
    """Read run folders and sweep folders, in the order they are named.

    Raises:
        SourceError: a place is no such folder; it says what is missing.
        CheckpointError: a file in it is damaged or of another release; it is named.
    """
    if not places:
        raise SourceError(
            "there is nothing to report", remedy="name run folders, or folders of sweeps"
        )
    runs: list[ReportedRun] = []
    sweeps: list[ReportedSweep] = []
    for place, name in zip(places, names_of(places), strict=True):
        if (place / "sweep.json").is_file():
            sweep = read_record(Sweep, place / "sweep.json")
            sweeps.append(ReportedSweep(name, SweepResult(sweep, place)))
        else:
            runs.append(read_run(place, name))
    return Records(tuple(runs), tuple(sweeps))


def names_of(places: Sequence[Path]) -> list[str]:
    """The shortest ends of paths by which they can be told apart."""
    parts = [place.resolve().parts for place in places]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(p[-length:] == own[-length:] for p in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def read_run(place: Path, name: str) -> ReportedRun:
    """Read a run folder.

    Raises:
        SourceError: it is none.
        CheckpointError: a file in it is damaged or of another release.
    """
    if not place.is_dir():
        raise SourceError(
            "there is no such folder", where=str(place), remedy="name a run folder or a sweep"
        )
    notes = place / "secateur"
    if not (notes / "manifest.json").is_file():
        raise SourceError(
            "this is neither a run folder nor a sweep: it has no secateur/manifest.json and no "
            "sweep.json",
            where=str(place),
            remedy="name a folder that `secateur prune`, `compress` or `sweep` wrote",
        )
    recipe, judged = notes / "recipe.yaml", notes / FILE_NAME
    return ReportedRun(
        name,
        place,
        read_record(Manifest, notes / "manifest.json"),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        layers=read_layers(notes / "layers.jsonl"),
        evaluation=read_evaluation(judged) if judged.is_file() else None,
        diagnosis=read_if_there(DiagnosisRecord, notes / "diagnosis.json"),
        bench=read_if_there(Bench, notes / "bench.json"),
        compression=read_if_there(Compression, notes / "compression.json"),
    )


def read_if_there(record: type[AnyRecord], file: Path) -> AnyRecord | None:
    """A file of a run that need not be there."""
    return read_record(record, file) if file.is_file() else None


def read_layers(file: Path) -> tuple[Layer, ...]:
    """What was done to each layer."""
    if not file.is_file():
        return ()
    lines = file.read_text(encoding="utf-8").splitlines()
    layers = [parsed(Layer, line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]
    return tuple(sorted(layers, key=lambda layer: layer.layer))
