"""Read what a report is about: folders of runs, fits, drafts and sweeps.

A folder is shown by the tables of the verbs that wrote its records.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.errors import SourceError
from secateur.models.configuration import HEAD, MTP, type_of
from secateur.reporting import models
from secateur.reporting.cards import source_name, without_folders
from secateur.reporting.diagnose import diagnosis
from secateur.reporting.evaluate import evaluation, timing
from secateur.reporting.fields import Result
from secateur.reporting.fit import (
    DraftedResult,
    DraftResult,
    FitResult,
    FittedResult,
    HeadResult,
    MTPResult,
)
from secateur.reporting.sweep import SweepResult
from secateur.reporting.tables import COMMAND, Block, Line, bare_name
from secateur.runs import measured, records
from secateur.runs.records import AnyRecord, parsed, read_list, read_record

Sections = dict[str, list[Block]]
"""Tables and lines by their headings."""


@dataclass(frozen=True)
class ReportedRun:
    """A folder of a model or of a sweep.

    Attributes:
        name: the name of the run on the page; unique.
        folder: the folder.
        made: what the verbs returned that made it, in their order.
        layers: the records of the layers.
        manifest: how it was pruned or cut, if it was.
        compression: its sizes, if it was compressed.
        fit: how its formats were chosen, if a fit made it.
        sweep: the measurements of a sweep.
        evaluation: its quality, if it was evaluated.
        bench: its speed, if it was timed.
        diagnosis: its findings, if it was diagnosed.
    """

    name: str
    folder: Path
    made: tuple[Result, ...]
    layers: tuple[records.Layer, ...]
    manifest: records.Manifest | None
    compression: models.CompressResult | None
    fit: FitResult | None
    sweep: SweepResult | None
    evaluation: measured.EvaluationRecord | None
    bench: measured.Bench | None
    diagnosis: measured.DiagnosisRecord | None

    @property
    def source(self) -> str:
        """The model that it was made from."""
        if self.manifest is not None:
            return source_name(self.manifest.source)
        if self.sweep is not None:
            return bare_name(self.sweep.sweep.model)
        return bare_name(self.compression.source if self.compression else "") or self.name

    @property
    def file_bytes(self) -> int | None:
        """The size of its weight files; None if no record has it."""
        if self.compression is not None:
            return self.compression.file_bytes
        return self.manifest.result.file_bytes if self.manifest else None

    @property
    def dense_bytes(self) -> int | None:
        """The size of the model in dense bfloat16, before any cut."""
        if self.manifest is not None and self.manifest.structure is not None:
            return records.BFLOAT16_BYTES * self.manifest.structure.before.parameters
        if self.compression is not None:
            return self.compression.bfloat16_bytes
        return records.BFLOAT16_BYTES * self.manifest.result.parameters if self.manifest else None

    def measured(self) -> Sections:
        """What was measured, without folders of this machine; no section without a measurement."""
        found: Sections = {}
        if self.evaluation is not None:
            names = {x.inherited_from for x in self.evaluation.results if x.inherited_from}
            others = [
                Line(f"Measured on {bare_name(name)}, which has the same weights.")
                for name in sorted(names)
            ]
            found["Quality"] = [*others, *evaluation(self.evaluation)]
        if self.bench is not None:
            found["Speed"] = timing(self.bench)
        if self.diagnosis is not None:
            found["Diagnosis"] = diagnosis(self.diagnosis)
        return {heading: _shown(blocks) for heading, blocks in found.items()}

    @property
    def card(self) -> str:
        """The text of its card; empty if it has none."""
        file = self.folder / "README.md"
        return _read_text(file) if file.is_file() else ""

    @property
    def files(self) -> dict[str, str]:
        """The texts of recipe and manifest by their names, without folders of this machine."""
        files = (self.folder / "secateur" / name for name in ("recipe.yaml", "manifest.json"))
        return {x.name: without_folders(_read_text(x)) for x in files if x.is_file()}

    def sections(self) -> Sections:
        """What the verbs printed that made it, what was measured, and the commands for more."""
        tables = [block for result in self.made for block in result.tables()]
        following = self.made[-1].following()  # of the last verb
        return {"": _shown(tables), **self.measured(), "What to try": _shown(following)}


def _shown(blocks: Iterable[Block]) -> list[Block]:
    """Blocks without the folders of this machine."""

    def text_of(line: Line) -> str:
        if line.style != COMMAND:
            return without_folders(line.text)
        # word by word: a space within a name is quoted, one between two words is not
        return "  " + shlex.join(map(without_folders, shlex.split(line.text)))

    return [
        Line(text_of(block), block.style)
        if isinstance(block, Line)
        else replace(
            block,
            title=without_folders(block.title),
            rows=tuple(tuple(map(without_folders, row)) for row in block.rows),
        )
        for block in blocks
    ]


def read_places(places: Sequence[Path]) -> list[ReportedRun]:
    """Read folders of runs and sweeps, in the given order.

    Raises:
        SourceError: a path is none of these; the error says what is missing.
        CheckpointError: a file is damaged or of another release; the error names it.
    """
    if not places:
        raise SourceError(
            "there is nothing to report",
            remedy="name folders of runs, sweeps, fits or drafts",
        )
    found = []
    for place, name in zip(places, _names_of(places), strict=True):
        if not place.is_dir():
            raise SourceError(
                "there is no such folder",
                where=str(place),
                remedy="name a folder of a run, a sweep or a fit",
            )
        found.append(read_run(place, name))
        if not found[-1].made:
            raise SourceError(
                "this is neither a run, nor a fit, nor a sweep: it has no secateur/manifest.json, "
                "no secateur/fit.json and no sweep.json",
                where=str(place),
                remedy="name a folder that `secateur prune`, `compress`, `fit` or `sweep` wrote",
            )
    return found


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


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


def read_run(folder: Path, name: str) -> ReportedRun:
    """Read all records of a folder; it may have none.

    Raises:
        CheckpointError: a file is damaged or of another release.
    """
    notes = folder / "secateur"

    def read(record: type[AnyRecord], file: str) -> AnyRecord | None:
        place = notes / file
        return read_record(record, place) if place.is_file() else None

    manifest, chain = read(records.Manifest, "manifest.json"), read(records.Chain, "chain.json")
    fit, draft = read(FitResult, "fit.json"), notes / "draft.json"
    drafts: dict[str, type[DraftedResult]] = {HEAD: HeadResult, MTP: MTPResult}
    kind = drafts.get(type_of(folder), DraftResult) if draft.is_file() else DraftResult
    chosen = fit or read(kind, draft.name)
    packed = read(models.CompressResult, "compression.json")
    if isinstance(chosen, FittedResult):
        packed = packed or chosen.packed
    lines, trained = notes / "layers.jsonl", notes / "training.json"
    swept = folder / "sweep.json"
    sweep = read_record(measured.Sweep, swept) if swept.is_file() else None
    curves = SweepResult(sweep=sweep, folder=folder) if sweep else None
    made: list[Result] = [result for result in (curves, chosen) if result is not None]
    if manifest is not None and manifest.structure is not None:
        made.append(models.StructureResult(output=folder, manifest=manifest))
    elif manifest is not None:
        zeros = manifest.result.decoder_sparsity
        made.append(models.PruneResult(sparsity=zeros, layers=[], manifest=manifest, output=folder))
    if trained.is_file():
        made += [
            models.TrainResult(output=folder, manifest=one)
            for one in read_list(records.Training, trained)
        ]
    if packed is not None and chosen is None:
        made.append(packed.model_copy(update={"output": folder}))
    if chain is not None:
        made.append(models.ChainResult(links=chain.links, output=folder))
    text = _read_text(lines).splitlines() if lines.is_file() else []
    layers = [
        parsed(records.Layer, line, f"{lines}:{number}")
        for number, line in enumerate(text, start=1)
    ]
    return ReportedRun(
        name,
        folder,
        tuple(made),
        tuple(sorted(layers, key=lambda layer: layer.layer)),
        manifest,
        packed,
        fit,
        curves,
        read(measured.EvaluationRecord, measured.FILE_NAME),
        read(measured.Bench, "bench.json"),
        read(measured.DiagnosisRecord, "diagnosis.json"),
    )
