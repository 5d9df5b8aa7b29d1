"""Read what a report is about: folders of runs, sweeps, fits and drafts, and files of advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from secateur.advisor.advise import AdviseResult
from secateur.errors import CheckpointError, SourceError
from secateur.reporting.cards import shown_place, source_name, without_folders
from secateur.reporting.draft import DraftResult
from secateur.reporting.fit import FitResult
from secateur.reporting.next_steps import Origin, command
from secateur.reporting.sweep import SweepResult
from secateur.runs.records import AnyRecord, Compression, Layer, Manifest, parsed, read_record
from secateur.runs.records.measured import (
    FILE_NAME,
    Bench,
    DiagnosisRecord,
    EvaluationRecord,
    Sweep,
    read_evaluation,
)

FIT, DRAFT = Path("secateur") / "fit.json", Path("secateur") / "draft.json"


@dataclass(frozen=True)
class ReportedRun:
    """A pruned model with all its measurements.

    Attributes:
        name: the name of the run on the page; unique.
        folder: the run folder.
        manifest: how the model was made.
        recipe: the recipe as YAML; empty if the folder has none.
        layers: the records of the layers.
        evaluation: its quality, if it was evaluated.
        diagnosis: its findings, if it was diagnosed.
        bench: its speed, if it was timed.
        compression: its sizes, if it was compressed.
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

    @property
    def place(self) -> str:
        """The folder in commands; the page may be read on another machine."""
        return shown_place(self.folder) if self.folder.name else self.folder.resolve().name

    @property
    def dense(self) -> str:
        """The dense model in commands and sentences."""
        return source_name(self.manifest.source)

    def judging(self, *more: str) -> str:
        """The command that evaluates the model beside its dense one, on a text without a hub."""
        words = map(without_folders, Origin.of(self.folder).text_words())
        return command("evaluate", self.place, "--dense", self.dense, *words, *more)

    def timing(self) -> str:
        """The command that times the model."""
        return command("bench", self.place)

    def checking(self) -> str:
        """The command that looks for faults, beside the dense model."""
        return command("diagnose", self.place, "--dense", self.dense)


AnyResult = TypeVar("AnyResult")


@dataclass(frozen=True)
class Reported(Generic[AnyResult]):
    """A sweep, a fit, a draft or an advice.

    Attributes:
        name: its name on the page.
        place: its folder or file.
        result: all its measurements.
    """

    name: str
    place: Path
    result: AnyResult


@dataclass(frozen=True)
class Records:
    """What a report is about."""

    runs: tuple[ReportedRun, ...] = ()
    sweeps: tuple[Reported[SweepResult], ...] = ()
    fits: tuple[Reported[FitResult], ...] = ()
    drafts: tuple[Reported[DraftResult], ...] = ()
    advices: tuple[Reported[AdviseResult], ...] = ()


def read_records(places: Sequence[Path]) -> Records:
    """Read folders of runs, sweeps, fits and drafts, and files of advice, in the given order.

    Raises:
        SourceError: a path is none of these; the error says what is missing.
        CheckpointError: a file is damaged or of another release; the error names it.
    """
    if not places:
        raise SourceError(
            "there is nothing to report", remedy="name folders of runs, sweeps, fits or drafts, "
            "or the JSON of an advice"
        )  # fmt: skip
    runs = list[ReportedRun]()
    sweeps, fits = list[Reported[SweepResult]](), list[Reported[FitResult]]()
    drafts, advices = list[Reported[DraftResult]](), list[Reported[AdviseResult]]()
    for place, name in zip(places, _names_of(places), strict=True):
        if (place / "sweep.json").is_file():
            sweep = read_record(Sweep, place / "sweep.json")
            sweeps.append(Reported(name, place, SweepResult(sweep, place)))
        elif (place / FIT).is_file():
            fits.append(Reported(name, place, read_record(FitResult, place / FIT)))
        elif (place / DRAFT).is_file():
            drafts.append(Reported(name, place, read_record(DraftResult, place / DRAFT)))
        elif place.is_file():
            advices.append(Reported(name, place, AdviseResult.read(place)))
        else:
            runs.append(read_run(place, name))
    return Records(tuple(runs), tuple(sweeps), tuple(fits), tuple(drafts), tuple(advices))


def _names_of(places: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that are all different."""
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
        SourceError: the folder is not a run folder.
        CheckpointError: a file is damaged or of another release.
    """
    if not place.is_dir():
        raise SourceError(
            "there is no such folder or file",
            where=str(place),
            remedy="name a folder of a run, a sweep or a fit, or the JSON of an advice",
        )
    notes = place / "secateur"
    if not (notes / "manifest.json").is_file():
        raise SourceError(
            "this is neither a run, nor a fit, nor a sweep: it has no secateur/manifest.json, no "
            "secateur/fit.json and no sweep.json",
            where=str(place),
            remedy="name a folder that `secateur prune`, `compress`, `fit` or `sweep` wrote",
        )
    recipe, judged, file = notes / "recipe.yaml", notes / FILE_NAME, notes / "layers.jsonl"
    lines = _read_text(file).splitlines() if file.is_file() else []
    layers = [parsed(Layer, line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]
    return ReportedRun(
        name,
        place,
        read_record(Manifest, notes / "manifest.json"),
        recipe=_read_text(recipe) if recipe.is_file() else "",
        layers=tuple(sorted(layers, key=lambda layer: layer.layer)),
        evaluation=read_evaluation(judged) if judged.is_file() else None,
        diagnosis=_read_if_there(DiagnosisRecord, notes / "diagnosis.json"),
        bench=_read_if_there(Bench, notes / "bench.json"),
        compression=_read_if_there(Compression, notes / "compression.json"),
    )


def _read_text(file: Path) -> str:
    """Read the text of a file of a run."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}",
            where=str(file),
            remedy="restore the file, or make the run again",
        ) from None


def _read_if_there(record: type[AnyRecord], file: Path) -> AnyRecord | None:
    """Read an optional file of a run; None if it does not exist."""
    return read_record(record, file) if file.is_file() else None
