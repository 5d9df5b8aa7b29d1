"""Runs a step: every verb that makes a folder or a file has this life.

folder   the output can be written, and holds nothing that the step reads
check    what needs no model is refused
source   is found, or fetched
open     everything that the recipe names is opened and checked; nothing is written
begin    the folder is locked; a stopped or finished run there must be the same one
work     fills the model's folder and its notes
finish   one rename gives the result its name
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from secateur.models.block_files import FOLDER as BLOCKS
from secateur.models.checkpoint import INDEX_NAMES, copy_others, refuse_not_finite, shard_files
from secateur.models.configuration import TrustedFolder
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.targets import CheckpointTarget
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress
from secateur.recipes.options import Option, Recipe, options_of
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.shared import parts_of
from secateur.recipes.verbs import VERBS, imported
from secateur.runs.environment import Meter
from secateur.runs.folder import NOTES, STATE, RunFolder, content_of, file_digests
from secateur.runs.measured import FILE_NAME as EVALUATION
from secateur.runs.measured import read_evaluation
from secateur.runs.output import check_free, write_json, writing

COMPRESSION = "compression.json"
"""The record of a compression."""

MEASURED = (EVALUATION, "diagnosis.json", "bench.json", COMPRESSION, STATE, BLOCKS.name)
"""Notes that measure the weights and files, belong to them, or name their run. All others record
how they were made."""

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
    """What the runner gives a step.

    Attributes:
        folder: the folder of the run.
        source: the model that it reads.
        progress: receives every step.
        meter: measures the cost, from the beginning.
        ranks: the processes that share the work; this one is the first.
        checked: what the check of the step has returned.
        output: the folder that its records and card name, where it is not that of the run: this is
            a part of another run, whose card says how to make it again.
    """

    folder: RunFolder
    source: LocalCheckpoint
    progress: Progress
    meter: Meter
    ranks: Ranks = ALONE
    checked: Any = None
    output: Path | None = None

    @property
    def place(self) -> Path:
        """The folder that records name."""
        return self.folder.output if self.output is None else self.output

    def carry_over(self, config: Mapping[str, Any], *, same_weights: bool) -> None:
        """Take over everything but the weights of the source, and write the configuration.

        That is tokenizer, licence, code and the records of earlier runs. Measurements of the source
        are not copied. The only exception is its evaluation if the weights are the same; each
        result then names the model it was measured on. A diagnosis and a bench also measure the
        files, so they must be repeated.

        Args:
            config: configuration of the result.
            same_weights: whether the result has exactly the weights of the source.

        Raises:
            MemoryBudgetError: the disk is full.
            CheckpointError: the evaluation of the source cannot be read.
        """
        source, made = self.source.folder, self.folder.model
        notes, inherited = source / NOTES, None
        if same_weights and (notes / EVALUATION).is_file():
            inherited = read_evaluation(notes / EVALUATION).inherited()
        with writing(made):
            copy_others(source, made, ("config.json", *INDEX_NAMES))
            if notes.is_dir() and any(file.name not in MEASURED for file in notes.iterdir()):
                shutil.copytree(
                    notes,
                    made / NOTES,
                    # notes of earlier steps are in subfolders and stay valid for those steps
                    ignore=lambda folder, _: MEASURED if Path(folder) == notes else (),
                    dirs_exist_ok=True,
                )
            write_json(made / "config.json", config)
        if inherited is not None:
            (made / NOTES).mkdir(exist_ok=True)
            inherited.save(made / NOTES / EVALUATION)

    def again(self, recipe: Recipe) -> str:
        """The recipe for the card; empty where another run has it."""
        return dump_recipe(recipe) if self.output is None else ""


@dataclass(frozen=True)
class Way(Generic[R, T]):
    """How a recipe is done.

    Attributes:
        step: does it.
        folder: makes the folder of the run, from its place, its verb, and `resume`, `restart` and
            `overwrite` of the call.
        source: what it reads, if that is known; else the model is found or fetched.
    """

    step: type[Step[R, T]]
    folder: Callable[..., RunFolder] = RunFolder
    source: LocalCheckpoint | None = None


class Step(ABC, Generic[R, T]):
    """A verb that makes a folder, at work on one recipe R. Its result is a T.

    A step is complete when it is constructed: `open` has read and checked everything.

    One that several processes can do also has `share(recipe, ranks)`, a class method with the work
    of a process that is not the first. It finds the source with the first one (`source_of`), and
    waits for what that one sends with `ranks.once`; None means that nothing is left to do. Where
    one process alone can do a recipe, `alone` names the option that makes it so.
    """

    verb: ClassVar[str]
    """The name on the command line."""

    measured_in: ClassVar[str] = "manifest.json"
    """The name of the record among its notes that says what was measured."""

    def __init__(self, recipe: R, run: RunContext) -> None:
        self.recipe, self.run = recipe, run

    @classmethod
    def way(cls, recipe: R) -> Way[R, T]:
        """The step that does a recipe, and where it works."""
        return Way(cls)

    @classmethod
    def caller(cls, recipe: R) -> Ranks:
        """The processes that all call the Python function of the verb."""
        return ALONE

    @classmethod
    def alone(cls, recipe: R) -> str:
        """The first option of a recipe with which several processes cannot do it, if any."""
        return ""

    @classmethod
    def check(cls, recipe: R) -> Any:
        """Refuse what can be refused without the model. What it returns is `run.checked`."""

    @classmethod
    def reads(cls, recipe: R) -> Iterable[str | Path | None]:
        """The files and folders that it reads besides the model."""
        return ()

    @classmethod
    def open(cls, recipe: R, run: RunContext) -> Step[R, T]:
        """Open and check everything that a recipe names. Writes nothing."""
        return cls(recipe, run)

    @property
    def disk_bytes(self) -> int:
        """The most bytes that it writes; 0 if it checks the disk by itself."""
        return 0

    def identity(self) -> Mapping[str, Any] | None:
        """What must not change while the run is stopped.

        Empty if a stopped run cannot be resumed, None if a finished one is not recognised either.
        """
        return None

    def settled(self) -> Mapping[str, Any]:
        """What else the result depends on. It may change while the run is stopped."""
        return {}

    def read_back(self) -> CheckpointTarget | None:
        """The layers of the result as its file has them; None if it is a folder that loads."""
        return None

    @abstractmethod
    def work(self) -> T:
        """Fill `run.folder.model` and `run.folder.notes`, and return the result."""

    @classmethod
    def result(cls, output: Path) -> T:
        """Read the result of a finished run."""
        raise NotImplementedError(f"`{cls.verb}` does not resume")


def carry_out(
    kind: type[Step[R, T]],
    recipe: R,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    at: Path | None = None,
    source: LocalCheckpoint | None = None,
    opening: Callable[[R, RunContext], Step[R, T]] | None = None,
) -> T:
    """Carry out the recipe of a verb, into a new folder.

    Args:
        kind: the step of the verb.
        recipe: its recipe, with `model` and `output`.
        progress: receives every step.
        resume: resume a stopped run, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
        ranks: the processes that share the work; this one is the first.
        at: the folder of a part of another run. Records and card name the output of the recipe.
        source: the model that it reads, if not the one that the recipe names.
        opening: opens the step, if not `kind.open`.

    Raises:
        SecateurError: what, where, and what to do.
    """
    meter = Meter.start()  # before any work, so that the cost has all of it
    values: Any = recipe
    way = kind.way(recipe) if source is None else Way(kind)
    kind, place = way.step, at or values.output
    if place and getattr(recipe, "trust_remote_code", False):
        place = TrustedFolder(place)  # the code of the source is copied to the results
    folder = way.folder(place, kind.verb, resume=resume, restart=restart, overwrite=overwrite)
    # by the names that the user gave; below also by where the source was found
    folder.keep_apart(values.model, *kind.reads(recipe))
    checked, judge = kind.check(recipe), judge_of(recipe)
    source = source or way.source or source_of(recipe, progress, ranks)
    output = None if at is None else Path(os.path.abspath(values.output))
    run = RunContext(folder, source, progress, meter, ranks, checked, output)
    step = (opening or kind.open)(recipe, run)
    folder.keep_apart(source.folder)
    if not folder.finished:
        check_free(step.disk_bytes, folder.output, folder.partial)
    with folder:
        identity = step.identity()
        if identity is not None:
            bounds = {"must_keep": list(values.gate.must_keep)} if judge else {}
            folder.begin(identity, {**step.settled(), **bounds})
        if folder.finished:
            ranks.once(lambda: None)  # the other processes have nothing to do
            return step.result(folder.output)
        result = step.work() if judge is None else judge.work(step)
        folder.finish()  # inside: an error in the rename keeps the work
        return step.result(folder.output) if result is None else result


def judge_of(recipe: Any) -> Any:
    """What judges the result of a recipe, its tasks and texts found; None where nothing does.

    Raises:
        SecateurError: a task or a text is not to be had.
    """
    bounds = recipe.gate.must_keep if hasattr(recipe, "gate") else ()
    return imported("secateur.steps.gate:Judge").of(recipe) if bounds else None


def recipe_identity(recipe: Recipe, without: Iterable[str]) -> dict[str, Any]:
    """A recipe for an identity: texts by their content, and paths without their spelling.

    Args:
        recipe: the recipe. Its model, its output and its gate are left out.
        without: other fields that are left out.
    """
    values = recipe.model_dump(mode="json", exclude={"model", "output", "gate", *without})
    for option in options_of(type(recipe)):
        *sections, key = option.path
        inner: Any = values
        for name in sections:
            inner = inner.get(name) or {}
        if option.is_path and inner.get(key):
            inner[key] = _as_read(option, inner[key])
    return values


def identity_of(
    recipe: Any, without: Iterable[str], weights: Iterable[Path], progress: Progress
) -> dict[str, Any]:
    """A recipe and its model for an identity.

    Args:
        recipe: the recipe. Of `memory`, only the size of a forward matters.
        without: other fields that do not affect the result.
        weights: the files of the model.
        progress: receives the reading of these files.
    """
    return {
        **recipe_identity(recipe, {"memory", *without}),
        "micro_batch_tokens": getattr(recipe.memory, "micro_batch_tokens", None),
        "source_files": model_digests(weights, progress),
    }


def _as_read(option: Option, value: Any) -> Any:
    """The value of an option that names files."""
    if isinstance(value, list):
        return [_as_read(option, x) for x in value]
    if option.flag.value != "TEXT":
        return os.path.realpath(value) if Path(value).expanduser().exists() else value
    if option.name == "calibration" and len(parts := parts_of(value)) > 1:
        return [[content_of(name), weight] for name, weight in parts]
    return content_of(value)


def model_digests(weights: Iterable[Path], progress: Progress) -> dict[str, str]:
    """SHA-256 of the files of a model that matter, by name: weights, configuration, tokenizer."""
    weights = list(weights)
    beside = (weights[0].parent / name for name in ("config.json", "tokenizer.json"))
    return file_digests([*weights, *filter(Path.is_file, beside)], progress)


def step_of(verb: str) -> type[Step[Any, Any]]:
    """The step of a verb, for verbs that carry out others. Imports it only now."""
    found: type[Step[Any, Any]] = imported(VERBS[verb].step)
    return found


def source_of(recipe: Any, progress: Progress, ranks: Ranks = ALONE) -> LocalCheckpoint:
    """Find or fetch the model that a recipe names, and read its weights once, for NaN.

    A GGUF file is converted. The first process does that, and all read the weights together.

    Args:
        recipe: the recipe.
        progress: receives the steps.
        ranks: the processes that all call this.
    """
    find = partial(
        resolve,
        recipe.model,
        dtype=getattr(recipe, "dtype", None),
        trust_remote_code=getattr(recipe, "trust_remote_code", False),
        values=False,
        progress=progress,
    )
    found = ranks.in_turn(find)
    refuse_not_finite(shard_files(found.folder), ranks)
    return found
