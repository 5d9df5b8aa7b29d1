"""`secateur structure FILE.gguf --output SMALLER.gguf`: the file itself is cut.

header ─► units that stay, by a list or by scores ─► edit ─► bytes are copied ─► read back

The scores of a run are stored before anything is copied, so a resumed run chooses the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import pydantic
import torch

import secateur
from secateur.engine.search.experts import best_experts
from secateur.errors import CheckpointError, RecipeError, first_line
from secateur.exporting.gguf.cut import cut_of
from secateur.exporting.gguf.cut_experts import experts_of
from secateur.exporting.gguf.cut_layers import FileLayers
from secateur.exporting.gguf.cut_tokens import check_vocabulary, tokens_of_texts
from secateur.exporting.gguf.edit import Edit, written
from secateur.exporting.gguf.expert_scores import READING, ImportanceMatrix, expert_scores
from secateur.exporting.gguf.llama_cpp import LlamaCpp, load_llama_cpp
from secateur.models.gguf_file import Field, GGUFSource, part_name, read_part
from secateur.models.sources import LocalCheckpoint
from secateur.recipes.options import options_of
from secateur.recipes.shared import texts_of
from secateur.recipes.structure import WIDTHS, StructureRecipe, numbers_in, structure_presets
from secateur.reporting.gguf_files import CutFileResult, FileCounts
from secateur.reporting.models import StructureResult
from secateur.runs.folder import RunFolder, State, check_output, content_of
from secateur.runs.ledger import Ledger
from secateur.runs.output import NO_REPLACE, check_replaceable, rename, write_json
from secateur.runs.records import Record, Source
from secateur.steps.runner import RunContext, Step, Way, recipe_identity
from secateur.structured.cut_plan import count, experts_in, trims_vocabulary
from secateur.structured.vocabulary import counted_text, read_texts

CUT = "secateur.cut"
"""The key of the metadata that lists the cuts of a file, as JSON."""

OPTIONS = (
    *("model", "output", "experts", "experts_by", "experts_list", "experts_scope", "imatrix"),
    *("keep_layers", "layers_list", "vocabulary", "vocabulary_size", "multiple"),
    *("calibration", "field", "windows", "sequence_length", "seed", "packing"),
)
"""The options that say something about a cut of bytes."""

NOTED = ("by", "by_weights", "tokens_before", "tokens_after", "covered", "texts")
"""What the file says of how units were chosen."""

CHOSEN, LEDGER = "chosen.json", "ledger.jsonl"
"""Files of the run: the units that stay, and how far the files are."""

RUN = "secateur.run"
"""The key of the metadata that has the digest of the run."""


class Units(Record):
    """The units that stay; None where all do.

    Attributes:
        experts: numbers by layer.
        layers: numbers of decoder layers.
        tokens: ids.
        notes: how each kind was chosen, by the name of the kind.
    """

    experts: dict[int, tuple[int, ...]] | None = None
    layers: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    notes: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)

    def edit(self, source: GGUFSource) -> Edit:
        """The edit that leaves them."""
        return cut_of(source, experts=self.experts, layers=self.layers, tokens=self.tokens)

    def record(self) -> dict[str, Any]:
        """What the file says of the cut: no scores, no paths, and of tokens only their number."""
        found = {}
        for kind, notes in self.notes.items():
            own = {key: notes[key] for key in NOTED if key in notes}
            if kind == "tokens":
                own["texts"] = [{**x, "text": Path(x["text"]).name} for x in notes["texts"]]
            else:
                own["kept"] = getattr(self, kind)
            if calibration := notes.get("calibration"):
                texts = texts_of(calibration["source"])
                own["text"] = ",".join(Path(text).name for text in texts)
            found[kind] = own
        return found


class FileRun(RunFolder):
    """The run of a GGUF file, or of several that are parts of one model.

        OUTPUT.partial/   as in a run that writes a folder; the files grow in OUTPUT.partial/model
        OUTPUT            a key of its metadata is a digest of the run, so that --resume knows it

    Every file gets its name by one rename, the first part last: no reader finds it before the
    others.

    Args:
        output: the file that the user names; the first of several files is that of the run.
        verb: the name of the command on the command line.
        parts: the number of files.
        call: `resume`, `restart` and `overwrite`.
    """

    def __init__(self, output: str | Path, verb: str, *, parts: int, **call: bool) -> None:
        place = Path(os.path.abspath(output))
        self.files = [part_name(place, number, parts) for number in range(parts)]
        super().__init__(self.files[0], verb, **call)

    @property
    def made(self) -> Path:
        """The first part, before it has its name."""
        return self.model / self.files[0].name

    def check_free_name(self, stopped: State | None = None, result: Path | None = None) -> None:
        """Refuse files that exist, unless they are GGUF files and may be replaced."""
        if stopped is not None and stopped.finished is not None:
            return  # some may have their names already
        for file in self.files:
            check_replaceable(file, self.overwrite, result, file=True)

    def stored(self) -> dict[str, Any]:
        """What the output says of the run that made it: the digest in its metadata."""
        digest = read_part(self.output).fields[RUN].value
        return {"verb": self.verb, "identity": _known(digest)}

    def begin(self, identity: Mapping[str, Any], settled: Mapping[str, Any] | None = None) -> None:
        """Store what the result depends on. A finished result is known by its digest."""
        super().begin(_known(digest_of(identity)) if self.finished else identity, settled)

    def take_name(self) -> None:
        """Give the files their names, the first part last."""
        for file in reversed(self.files):
            made = self.model / file.name
            if made.exists() and (self.overwrite or not rename(made, file, NO_REPLACE)):
                made.replace(file)


def _known(digest: str) -> dict[str, Any]:
    """An identity of which only the digest is known."""
    return {RUN: {"spelled": "its options and files", "sha256": digest}}


def digest_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity, whatever its files are called."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return value.get("sha256") or {key: bare(inner) for key, inner in value.items()}
        return [bare(inner) for inner in value] if isinstance(value, list | tuple) else value

    text = json.dumps(bare(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileSource(LocalCheckpoint):
    """The file that is cut, with its header.

    Attributes:
        header: of the file.
    """

    header: GGUFSource


class CutFile(Step[StructureRecipe, StructureResult | CutFileResult]):
    """Cut experts, layers or tokens out of a GGUF file, and write a smaller one."""

    verb = "structure"

    def __init__(self, recipe: StructureRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        assert isinstance(run.source, FileSource)
        self.source = run.source.header
        self.planned = planned(recipe, self.source)
        work = run.folder.work
        run.folder.worth_resuming = lambda: any(work.iterdir())

    @classmethod
    def way(cls, recipe: StructureRecipe) -> Way[StructureRecipe, StructureResult | CutFileResult]:
        """Beside the output, which has as many parts as the source."""
        header = GGUFSource.read(recipe.model)
        record = Source(name=recipe.model, kind="gguf", revision=None, file_bytes=header.size_bytes)
        source = FileSource(header.file, record, header)
        return Way(cls, partial(FileRun, parts=len(header.parts)), source)

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
        named = [recipe.calibration.source, *filter(None, [recipe.vocabulary])]
        texts = [text for each in named for text in texts_of(each)]
        return [*texts, recipe.experts_list, recipe.imatrix]

    @property
    def disk_bytes(self) -> int:
        """The bytes of the result, if all tokens stay."""
        return self.planned.edit(self.source).bytes_in(self.source)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Everything that affects the result."""
        options = recipe_identity(self.recipe, ("memory", "experts_list", "imatrix"))
        files = {name: getattr(self.recipe, name) for name in ("experts_list", "imatrix")}
        read = {name: file and content_of(file) for name, file in files.items()}
        return {**options, **read, "source_files": self.source.identity()}

    def identity(self) -> dict[str, Any]:
        """The same."""
        return self.made_of

    def work(self) -> CutFileResult:
        """Choose the units, copy what stays, and read the result."""
        folder = self.run.folder
        assert isinstance(folder, FileRun)
        file, ledger = folder.work / CHOSEN, Ledger(folder.work / LEDGER)
        if not file.exists():
            write_json(file, self.chosen().to_json())
        edit = self.noted(Units.model_validate_json(file.read_bytes()))
        if ledger.begun:
            ledger.resume()
        if folder.state is None or folder.state.finished is None:
            output = folder.model / Path(self.recipe.output or "").name
            written(self.source, edit, output, self.run.progress, ledger)
        # after a kill, some have their names already
        made = ((folder.model / file.name, file) for file in folder.files)
        files = [new if new.exists() else file for new, file in made]
        seconds = time.perf_counter() - self.run.meter.started
        found = _result_of(GGUFSource.of_parts([*map(read_part, files)]), folder.output)
        return found.model_copy(update={"source": self.recipe.model, "seconds": seconds})

    @classmethod
    def result(cls, output: Path) -> CutFileResult:
        """Read the result of a finished run from its metadata."""
        return _result_of(GGUFSource.read(output), output)

    def chosen(self) -> Units:
        """The units that stay, by their scores where no list names them."""
        recipe, source, progress = self.recipe, self.source, self.run.progress
        notes = dict[str, dict[str, Any]]()
        found = {**dict(self.planned), "notes": notes}
        if recipe.experts_list is not None:
            notes["experts"] = {"by": "list"}
        elif self.planned.experts is not None:
            experts = experts_of(source)
            assert experts is not None
            keep = len(next(iter(self.planned.experts.values())))
            imatrix = None if recipe.imatrix is None else Path(recipe.imatrix).expanduser()
            scores, notes["experts"] = expert_scores(
                source, experts.layers, recipe.experts_by, recipe.calibration, imatrix,
                self.run.folder.work, progress,
            )  # fmt: skip
            found["experts"] = best_experts(scores, keep, experts.used, groups=experts.groups)
        if recipe.layers_list is not None:
            notes["layers"] = {"by": "list"}
        elif (fewer := _kept_layers(recipe, source)) is not None:
            layers = FileLayers.of(source)
            with LlamaCpp(source.file) as engine:
                windows, record = engine.windows(recipe.calibration)
                influence = layers.influence(engine, windows, progress)
            found["layers"] = layers.best(influence, fewer)
            notes["layers"] = {"by": recipe.depth.by, "calibration": record}
        if trims_vocabulary(recipe):
            texts = read_texts(counted_text(recipe), recipe.calibration.field)
            found["tokens"], notes["tokens"] = tokens_of_texts(
                source, texts, recipe.vocabulary_size, progress, multiple=recipe.multiple
            )
        return Units(**found)

    def noted(self, units: Units) -> Edit:
        """The edit, with the keys that say what was cut."""
        before = FileCounts.of(self.source).to_json()
        name = Path(self.recipe.model).name
        cuts = [*cuts_of(self.source), {"source": name, "before": before, **units.record()}]
        keys = {
            "secateur.version": secateur.__version__,
            "secateur.source": name,
            CUT: json.dumps(cuts),
            RUN: digest_of(self.made_of),
        }
        edit = units.edit(self.source)
        texts = {key: Field.text(text) for key, text in keys.items()}
        return replace(edit, fields={**edit.fields, **texts})


def planned(recipe: StructureRecipe, source: GGUFSource) -> Units:
    """The units that stay, without a score: the first ones stand for those that it will choose.

    Raises:
        RecipeError: a number or a list does not fit the file, or nothing is cut.
        ArchitectureError: this file cannot be cut so.
    """
    if trims_vocabulary(recipe):
        check_vocabulary(source)
        counted_text(recipe)
    layers = None if recipe.layers_list is None else numbers_in(recipe.layers_list)
    units = Units(experts=_planned_experts(recipe, source), layers=layers)
    fewer = trims_vocabulary(recipe) or _kept_layers(recipe, source) is not None
    if units.experts is None and units.layers is None and not fewer:
        raise RecipeError(
            "the recipe keeps everything that the file has", remedy="keep fewer experts or layers"
        )
    units.edit(source)
    return units


def _kept_layers(recipe: StructureRecipe, source: GGUFSource) -> int | None:
    """How many layers a score keeps; None if none decides."""
    if recipe.keep_layers is None:
        return None
    layers = FileLayers.of(source).count
    keep = count(recipe.keep_layers, layers, "decoder layers")
    return keep if keep < layers else None


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
            if option.name in ("must_keep", "must_keep_items", "task_data"):
                reason = "`secateur evaluate FILE --dense SOURCE` judges the file"
            yield f"{option.flag_text}: bytes are copied, and {reason}"
    if recipe.experts_by == "divergence":
        yield "--experts-by divergence: llama.cpp has no gradients; cut the model it was made from"
    if recipe.experts_scope == "global":
        yield "--experts-scope global: llama.cpp reads one number of experts for all layers"


def cuts_of(source: GGUFSource) -> list[dict[str, Any]]:
    """The cuts that a file tells of, the first one first."""
    stored = source.fields.get(CUT)
    try:
        found = json.loads(stored.value) if stored is not None else []
    except (TypeError, ValueError, RecursionError):
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
        after = FileCounts.of(source)
        return CutFileResult(output=output, source=name, before=before, after=after, cut=cut)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the file does not tell how it was made: {first_line(error)}",
            where=str(source.file),
            remedy="make it again with --overwrite",
        ) from error


def plan_file(recipe: StructureRecipe, call: Mapping[str, Any]) -> CutFileResult:
    """Check a recipe, and show what the cut would leave. The header alone is read.

    Args:
        recipe: of the cut.
        call: the other options of the call.

    Raises:
        SecateurError: as the cut would.
    """
    CutFile.check(recipe)
    source = GGUFSource.read(recipe.model)
    edit = planned(recipe, source).edit(source)
    size, read = edit.bytes_in(source), [recipe.model, source.file, *CutFile.reads(recipe)]
    folder = partial(FileRun, parts=len(source.parts))
    check_output(recipe.output, CutFile.verb, size, read, call, folder)
    unknown = {
        "--keep-layers": _kept_layers(recipe, source) is not None,
        "--vocabulary": trims_vocabulary(recipe),
    }
    after = FileCounts.of(edit.foreseen(source)).model_copy(update={"file_bytes": size})
    return CutFileResult(
        source=recipe.model,
        before=FileCounts.of(source),
        after=after,
        unknown=[name for name, given in unknown.items() if given],
    )


def _planned_experts(
    recipe: StructureRecipe, source: GGUFSource
) -> Mapping[int, Sequence[int]] | None:
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
        return experts_in(recipe.experts_list)
    assert recipe.experts is not None
    keep = count(recipe.experts, experts.count, "experts")
    if keep == experts.count:
        return None
    if recipe.imatrix is not None:
        ImportanceMatrix.read(Path(recipe.imatrix).expanduser())
    if recipe.experts_by in READING:
        load_llama_cpp()
    flat = dict.fromkeys(experts.layers, torch.zeros(experts.count))
    return best_experts(flat, keep, experts.used, groups=experts.groups)
