"""`secateur structure FILE.gguf --output SMALLER.gguf`: the file itself is cut.

header ─► units that stay, by a list or by scores ─► edit ─► bytes are copied ─► read back

The scores of a run are stored before anything is copied, so a resumed run chooses the same.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.calibration.documents import read_documents
from secateur.engine.search.experts import best_experts
from secateur.errors import CheckpointError, RecipeError, first_line
from secateur.exporting.gguf.cut import cut_of
from secateur.exporting.gguf.cut_experts import experts_of
from secateur.exporting.gguf.cut_layers import FileLayers, layer_influence, layers_that_stay
from secateur.exporting.gguf.cut_tokens import check_vocabulary, tokens_of_text
from secateur.exporting.gguf.edit import Edit, part_name, written
from secateur.exporting.gguf.expert_scores import READING, expert_scores
from secateur.exporting.gguf.file_run import RUN, FileRun, digest_of
from secateur.exporting.gguf.importance import ImportanceMatrix
from secateur.exporting.gguf.llama_cpp import LlamaCpp, load_llama_cpp
from secateur.models.gguf_file import Field, GGUFSource, read_part
from secateur.models.sources import LocalCheckpoint
from secateur.parallel.ranks import Ranks
from secateur.progress import Progress
from secateur.recipes.options import options_of
from secateur.recipes.shared import texts_of
from secateur.recipes.structure import WIDTHS, StructureRecipe, structure_presets
from secateur.reporting.gguf_files import CutFilePlanResult, CutFileResult, FileCounts
from secateur.reporting.models import StructureResult
from secateur.runs.folder import RunFolder, content_of
from secateur.runs.ledger import Ledger
from secateur.runs.output import check_free, write_json
from secateur.runs.records import Source
from secateur.steps.runner import RunContext, Step, recipe_identity
from secateur.structured.cut_plan import count, trims_vocabulary
from secateur.structured.vocabulary import counted_text

CUT = "secateur.cut"
"""The key of the metadata that lists the cuts of a file, as JSON."""

OPTIONS = (
    *("model", "output", "experts", "experts_by", "experts_list", "experts_scope", "imatrix"),
    *("keep_layers", "layers_list", "vocabulary", "vocabulary_size"),
    *("calibration", "field", "windows", "sequence_length", "seed", "packing"),
)
"""The options that say something about a cut of bytes."""

TOLD = ("by", "by_weights", "tokens_before", "tokens_after", "covered")
"""What the file says of how units were chosen."""

CHOSEN, LEDGER = "chosen.json", "ledger.jsonl"
"""Files of the run: the units that stay, and how far the files are."""


@dataclass(frozen=True)
class Units:
    """The units that stay; None where all do.

    Attributes:
        experts: numbers by layer.
        layers: numbers of decoder layers.
        tokens: ids.
        notes: how each kind was chosen, by the name of the kind.
    """

    experts: Mapping[int, Sequence[int]] | None = None
    layers: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**vars(self), "notes": dict(self.notes)}

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> Units:
        """From what `to_json` has given. JSON has no keys that are numbers."""
        experts = stored["experts"]
        by_layer = experts and {int(layer): kept for layer, kept in experts.items()}
        return cls(**{**stored, "experts": by_layer})

    def record(self) -> dict[str, Any]:
        """What the file says of the cut: no scores, no paths, and of tokens only their number."""
        found = {}
        for kind, notes in self.notes.items():
            kept = None if kind == "tokens" else getattr(self, kind)
            own = {key: notes[key] for key in TOLD if key in notes} | (
                {"kept": kept} if kept else {}
            )
            if calibration := notes.get("calibration"):
                texts = texts_of(calibration["source"])
                own["text"] = ",".join(Path(text).name for text in texts)
            found[kind] = own
        return found


def edited(source: GGUFSource, units: Units) -> Edit:
    """The edit that leaves these units."""
    return cut_of(source, experts=units.experts, layers=units.layers, tokens=units.tokens)


def _read(model: str) -> GGUFSource:
    """The file that a recipe names. A large vocabulary takes a second, so it is read once."""
    status = Path(model).expanduser().stat()
    return _read_at(model, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_at(model: str, size: int, changed: int) -> GGUFSource:
    """The file of a name, as long as it does not change."""
    return GGUFSource.read(model)


class CutFile(Step[StructureRecipe, StructureResult | CutFileResult]):
    """Cut experts, layers or tokens out of a GGUF file, and write a smaller one."""

    verb = "structure"

    def __init__(self, recipe: StructureRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.source = _read(recipe.model)
        self.planned = planned(recipe, self.source)
        work = run.folder.work
        run.folder.worth_resuming = lambda: any(work.iterdir())

    @classmethod
    def run_folder(
        cls, recipe: StructureRecipe, place: Path | str | None, **call: bool
    ) -> RunFolder:
        """Beside the output, which has as many parts as the source."""
        output = Path(os.path.abspath(str(place)))
        parts = len(_read(recipe.model).parts)
        names = [part_name(output, number, parts).name for number in range(parts)]
        return FileRun(names, output, cls.verb, **call)

    @classmethod
    def found(cls, recipe: StructureRecipe, progress: Progress, ranks: Ranks) -> LocalCheckpoint:
        """The file itself."""
        source = _read(recipe.model)
        record = Source(name=recipe.model, kind="gguf", revision=None, file_bytes=source.size_bytes)
        return LocalCheckpoint(source.file, record)

    @classmethod
    def check(cls, recipe: StructureRecipe) -> None:
        """Refuse the options that would need other weights than those of the file."""
        if faults := [*_faults(recipe)]:
            raise RecipeError.of(
                faults,
                remedy="leave them out; or name a folder as --output, for a result of safetensors",
            )

    @classmethod
    def reads(cls, recipe: StructureRecipe) -> Iterable[str | Path | None]:
        """Texts, the list of experts and the importance matrix."""
        texts = texts_of(recipe.calibration.source)
        return [*texts, recipe.vocabulary, recipe.experts_list, recipe.imatrix]

    @property
    def disk_bytes(self) -> int:
        """The bytes of the result, if all tokens stay."""
        return edited(self.source, self.planned).bytes_in(self.source)

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        options = recipe_identity(self.recipe, ("memory", "experts_list", "imatrix"))
        files = {name: getattr(self.recipe, name) for name in ("experts_list", "imatrix")}
        read = {name: file and content_of(file) for name, file in files.items()}
        return {**options, **read, "source_files": self.source.identity()}

    def work(self) -> CutFileResult:
        """Choose the units, copy what stays, and read the result."""
        folder, progress = self.run.folder, self.run.progress
        assert isinstance(folder, FileRun)
        units = self.chosen_units()
        made = self.noted(edited(self.source, units), units)
        ledger = Ledger(folder.work / LEDGER)
        if ledger.begun:
            ledger.resume()
        else:
            ledger.begin()
        if not folder.is_written:
            output = folder.model / Path(self.recipe.output or "").name
            written(self.source, made, output, progress, ledger)
        files = [folder.model / file.name for file in folder.files]
        # some may have their names already
        places = [a if a.exists() else b for a, b in zip(files, folder.files, strict=True)]
        seconds = time.perf_counter() - self.run.meter.started
        found = _result_of(GGUFSource.of_parts([*map(read_part, places)]), folder.output)
        return found.model_copy(update={"source": self.recipe.model, "seconds": seconds})

    @classmethod
    def result(cls, output: Path) -> CutFileResult:
        """Read the result of a finished run from its metadata."""
        return _result_of(GGUFSource.read(output), output)

    def chosen_units(self) -> Units:
        """The units that stay, from an earlier run if there was one."""
        file = self.run.folder.work / CHOSEN
        if not file.exists():
            units = chosen(self.recipe, self.source, self.planned, file.parent, self.run.progress)
            write_json(file, units.to_json())
        return Units.of_json(json.loads(file.read_text(encoding="utf-8")))

    def noted(self, edit: Edit, units: Units) -> Edit:
        """The edit with the keys that say what was cut."""
        before = FileCounts.of(self.source).to_json()
        name = Path(self.recipe.model).name
        cuts = [*cuts_of(self.source), {"source": name, "before": before, **units.record()}]
        keys = {
            "secateur.version": secateur.__version__,
            "secateur.source": name,
            CUT: json.dumps(cuts),
            RUN: digest_of(self.identity()),
        }
        return edit.with_fields({key: Field.text(text) for key, text in keys.items()})


def planned(recipe: StructureRecipe, source: GGUFSource) -> Units:
    """The units that stay, without a score: the first ones stand for those that it will choose.

    Raises:
        RecipeError: a number or a list does not fit the file, or nothing is cut.
        ArchitectureError: this file cannot be cut so.
    """
    if trims_vocabulary(recipe):
        check_vocabulary(source)
        counted_text(recipe)
    listed = recipe.layers_list
    layers = None if listed is None else _listed_layers(listed)
    units = Units(experts=_planned_experts(recipe, source), layers=layers)
    fewer = trims_vocabulary(recipe) or _kept_layers(recipe, source) is not None
    if units.experts is None and units.layers is None and not fewer:
        raise RecipeError(
            "the recipe keeps everything that the file has", remedy="keep fewer experts or layers"
        )
    edited(source, units)
    return units


def _kept_layers(recipe: StructureRecipe, source: GGUFSource) -> int | None:
    """How many layers a score keeps; None if none decides."""
    if recipe.keep_layers is None:
        return None
    layers = FileLayers.of(source).count
    keep = count(recipe.keep_layers, layers, "decoder layers")
    return keep if keep < layers else None


def chosen(
    recipe: StructureRecipe, source: GGUFSource, units: Units, work: Path, progress: Progress
) -> Units:
    """The units that stay, by their scores where no list names them.

    Args:
        recipe: the recipe.
        source: the file.
        units: what is planned.
        work: the folder of the run.
        progress: receives the steps.
    """
    notes: dict[str, Any] = {}
    by_hand = {"by": "list"}
    if recipe.experts_list is not None:
        notes["experts"] = by_hand
    elif units.experts is not None:
        keep = len(next(iter(units.experts.values())))
        experts, notes["experts"] = _best_experts(recipe, source, keep, work, progress)
        units = replace(units, experts=experts)
    if recipe.layers_list is not None:
        notes["layers"] = by_hand
    elif (fewer := _kept_layers(recipe, source)) is not None:
        layers, notes["layers"] = _influential(recipe, source, fewer, progress)
        units = replace(units, layers=layers)
    if trims_vocabulary(recipe):
        texts, field = texts_of(counted_text(recipe)), recipe.calibration.field
        documents = [each for text in texts for each in read_documents(text, field=field)]
        size = recipe.vocabulary_size
        tokens, notes["tokens"] = tokens_of_text(source, documents, size, progress)
        units = replace(units, tokens=tokens)
    return replace(units, notes=notes)


def _influential(
    recipe: StructureRecipe, source: GGUFSource, keep: int, progress: Progress
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers that change their input most, and how they were chosen."""
    layers = FileLayers.of(source)
    with LlamaCpp(source.file) as engine:
        windows, record = engine.windows(recipe.calibration)
        scores = layer_influence(engine, layers.count, windows, progress)
    kept = layers_that_stay(layers, scores, keep)
    return kept, {"by": recipe.depth.by, "calibration": record}


def _best_experts(
    recipe: StructureRecipe, source: GGUFSource, keep: int, work: Path, progress: Progress
) -> tuple[dict[int, tuple[int, ...]], dict[str, Any]]:
    """The experts with the highest scores, and how they were chosen."""
    experts = experts_of(source)
    assert experts is not None
    imatrix = None if recipe.imatrix is None else Path(recipe.imatrix).expanduser()
    scores, notes = expert_scores(
        source, experts.layers, recipe.experts_by, recipe.calibration, imatrix, work, progress
    )
    return best_experts(scores, keep, experts.used, groups=experts.groups), notes


def _faults(recipe: StructureRecipe) -> Iterator[str]:
    """The options that a cut of bytes cannot obey, with the reason."""
    preset = structure_presets.get(recipe.effort or "", {})
    usual = StructureRecipe.model_validate({"model": recipe.model, **preset})
    for option in options_of(StructureRecipe):
        values = [reduce(getattr, option.path, each) for each in (recipe, usual)]
        known = option.name in OPTIONS or (option.name == "effort" and recipe.effort == "balanced")
        if values[0] != values[1] and not known:
            reason = "nothing is fitted or trained"
            if option.name in WIDTHS:
                reason = "it would cut through the blocks in which weights are stored"
            yield f"{option.flag_text}: bytes are copied, and {reason}"
    if recipe.experts_by == "merge":
        yield "--experts-by merge: bytes are copied, and averaged experts are new weights"
    if recipe.experts_scope == "global":
        yield "--experts-scope global: llama.cpp reads one number of experts for all layers"


def cuts_of(source: GGUFSource) -> list[dict[str, Any]]:
    """The cuts that a file tells of, the first one first."""
    stored = source.fields.get(CUT)
    try:
        found = json.loads(stored.value) if stored is not None else []
    except (TypeError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _result_of(source: GGUFSource, output: Path) -> CutFileResult:
    """The result of a run, from its files.

    Raises:
        CheckpointError: they do not tell of a cut.
    """
    try:
        *_, cut = cuts_of(source)
        before = FileCounts.model_validate(cut.pop("before"))
        name = str(cut.pop("source"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the file does not tell how it was made: {first_line(error)}",
            where=str(source.file),
            remedy="make it again with --overwrite",
        ) from error
    return CutFileResult(
        output=output, source=name, before=before, after=FileCounts.of(source), cut=cut,
        seconds=None,
    )  # fmt: skip


def plan_file(
    recipe: StructureRecipe, progress: Progress, call: Mapping[str, Any]
) -> CutFilePlanResult:
    """Check a recipe, and show what the cut would leave.

    Args:
        recipe: of the cut.
        progress: is not used; the header alone is read.
        call: the other options of the call.

    Raises:
        SecateurError: as the cut would.
    """
    CutFile.check(recipe)
    source = _read(recipe.model)
    units = planned(recipe, source)
    edit = edited(source, units)
    size = edit.bytes_in(source)
    if recipe.output is not None:
        names = ("resume", "restart", "overwrite")
        call = {name: bool(call.get(name)) for name in names}
        folder = CutFile.run_folder(recipe, recipe.output, **call)
        folder.keep_apart(recipe.model, source.file, *CutFile.reads(recipe))
        check_free(size, folder.output, folder.partial)
    unknown = {
        "--keep-layers": _kept_layers(recipe, source) is not None,
        "--vocabulary": trims_vocabulary(recipe),
    }
    after = FileCounts.of(edit.foreseen(source)).model_copy(update={"file_bytes": size})
    return CutFilePlanResult(
        before=FileCounts.of(source),
        after=after,
        unknown=[name for name, given in unknown.items() if given],
    )


def _planned_experts(recipe: StructureRecipe, source: GGUFSource) -> dict[int, list[int]] | None:
    """The experts of a list, or the first ones of each group."""
    if recipe.experts is None and recipe.experts_list is None:
        return None
    experts = experts_of(source)
    if experts is None:
        raise RecipeError(
            "the model has no experts",
            where=str(source.file),
            remedy="leave --experts and --experts-list out",
        )
    if recipe.experts_list is not None:
        return _listed_experts(Path(recipe.experts_list).expanduser())
    assert recipe.experts is not None
    keep = count(recipe.experts, experts.count, "experts")
    if keep == experts.count:
        return None
    if recipe.imatrix is not None:
        ImportanceMatrix.read(Path(recipe.imatrix).expanduser())
    if recipe.experts_by in READING:
        load_llama_cpp()
    flat = torch.zeros(experts.count)
    kept = best_experts(
        dict.fromkeys(experts.layers, flat), keep, experts.used, groups=experts.groups
    )
    return {layer: [*own] for layer, own in kept.items()}


def _listed_experts(file: Path) -> dict[int, list[int]]:
    """The experts of each layer that a file names.

    Raises:
        RecipeError: it is no JSON object of numbers.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        found = {int(layer): [*map(operator.index, own)] for layer, own in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"the list of experts cannot be read: {first_line(error)}",
            where=str(file),
            remedy='write the numbers of the experts that stay by layer: {"0": [1, 2, 5], …}',
        ) from None
    return found


def _listed_layers(text: str) -> list[int]:
    """The layers that a list names.

    Raises:
        RecipeError: it is no list of numbers and ranges.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if match is None:
            raise RecipeError(
                f"{part!r} is no number and no range of layers",
                where="--layers-list",
                remedy="write numbers and ranges with commas between them: 0-11,14,16-31",
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
