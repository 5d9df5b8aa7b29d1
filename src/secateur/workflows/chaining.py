"""A chain: cut, prune, train, compress, one after the other, with one account of what is left.

Each step is what its verb does, from the folder of the step before. A step's folder is there whole
or not at all, so a killed chain goes on with the step it was in, which goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.diagnostics.audit import audit_checkpoint
from secateur.engine.ledger import write_whole
from secateur.engine.progress import Progress, Silent
from secateur.errors import RecipeError, SecateurError
from secateur.models.sources import resolve
from secateur.recipes.reading import (
    SECTIONS,
    build_recipe,
    build_structure_recipe,
    nested,
    validated,
)
from secateur.recipes.schema import PruneRecipe
from secateur.recipes.training_schema import DistillRecipe, RetrainRecipe
from secateur.registry import did_you_mean
from secateur.workflows.carrying import RUN_FOLDER
from secateur.workflows.compress_options import check_compression
from secateur.workflows.compressing import compress
from secateur.workflows.places import places
from secateur.workflows.preparing import allocation_of, choose_device, method_of, settings_of
from secateur.workflows.pruning import prune
from secateur.workflows.retraining import distill, retrain
from secateur.workflows.structuring import structure

__all__ = ["ChainReport", "Link", "chain"]

VERBS: Mapping[str, Callable[..., Any]] = {
    "structure": structure,
    "prune": prune,
    "retrain": retrain,
    "distill": distill,
    "compress": compress,
}
"""What a step can be."""

PLAN = "chain.json"

BEGUN = {
    "structure": "secateur/recipe.yaml",
    "prune": "secateur/layers.jsonl",
    "retrain": "work",
    "distill": "work",
}
"""What a verb that was stopped has left in its partial folder, if it can go on."""

ENDS = {"model": "model", "output": "output"}
"""What a recipe must have, and a step has not yet when it is checked."""


CHECKS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "structure": lambda options: build_structure_recipe(nested({**ENDS, **options})),
    "prune": lambda options: check_recipe(build_recipe(nested({**ENDS, **options}))),
    "retrain": lambda options: validated(RetrainRecipe, {**ENDS, **options}, None),
    "distill": lambda options: validated(DistillRecipe, {**ENDS, **options}, None),
    "compress": lambda options: check_compression(**options),
}
"""How the options of a verb are checked before any work."""

GIVEN = {"model", "output", "resume", "restart", "overwrite", "progress"}
"""Options of a verb that a chain gives itself."""


@dataclass(frozen=True)
class Link:
    """What is left after a step.

    Attributes:
        step: the verb; `source` for the model as it was.
        parameters: of the whole model.
        zeros: of its parameters.
        file_bytes: of the weight files.
        seconds: that the step took.
    """

    step: str
    parameters: int
    zeros: int
    file_bytes: int
    seconds: float

    @property
    def kept(self) -> int:
        """Parameters that are there and not zero."""
        return self.parameters - self.zeros


@dataclass(frozen=True)
class ChainReport:
    """What a chain did: the model as it was, and after each step."""

    links: tuple[Link, ...]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        links = [{**asdict(link), "kept": link.kept} for link in self.links]
        return {"links": links, "output": str(self.output)}


def chain(
    model: str | Path,
    *,
    output: str | Path,
    steps: Sequence[Mapping[str, Mapping[str, Any] | None]],
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ChainReport:
    """Carry out several verbs, each on what the one before it made.

    Args:
        model: hub id, folder, GGUF file or named sample.
        output: the folder of the last step's model.
        steps: each a verb (structure, prune, retrain, distill, compress) with its options. The
            teacher of a distillation is the chain's model, unless another is named.
        resume: go on with a stopped chain.
        restart: discard what a stopped chain left.
        overwrite: replace an existing output folder.
        trust_remote_code: whether code that comes with the checkpoint may run.
        progress: told of every step.

    Raises:
        RecipeError: a step is unknown or has an unknown option, told before any work.
    """
    progress = progress or Silent()
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
        raise RecipeError(
            "the chain has no steps in a list", remedy="for example steps: [prune: {…}]"
        )
    wanted = [checked(number, step) for number, step in enumerate(steps, start=1)]
    source = resolve(str(model), trust_remote_code=trust_remote_code)
    place, work = places(output, PLAN, "chain", resume=resume, restart=restart, overwrite=overwrite)
    begin(work, wanted, resume)
    folder = source.folder
    links = [counted("source", folder, 0.0, trust_remote_code)]
    for number, (verb, options) in enumerate(wanted, start=1):
        made, told = work / f"{number:02d}-{verb}", work / f"{number:02d}-{verb}.json"
        if verb == "distill":  # whatever was cut and pruned since
            options.setdefault("teacher", str(model))
        if not told.exists():
            started = time.perf_counter()
            if not made.exists():
                carry_out(verb, options, folder, made, trust_remote_code, progress)
            seconds = time.perf_counter() - started
            write_whole(told, asdict(counted(verb, made, seconds, trust_remote_code)))
        links.append(Link(**json.loads(told.read_text(encoding="utf-8"))))
        folder = made
    report = ChainReport(tuple(links), place)
    finish(folder, work, report)
    return report


def checked(number: int, step: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A step's verb and options.

    Raises:
        RecipeError: it cannot be carried out, and why.
    """
    where = f"step {number} of the chain"
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(
            "a step is one verb with its options", where=where, remedy="prune: {sparsity: 0.5}"
        )
    (verb, given), options = next(iter(step.items())), {}
    if verb not in VERBS:
        raise RecipeError(
            f"{verb!r} is no step", where=where, remedy=did_you_mean(str(verb), [*VERBS])
        )
    where = f"{where}: {verb}"
    if given is not None and not isinstance(given, Mapping):
        raise RecipeError(
            f"the options are {str(given)[:40]!r}, not keys and values",
            where=where,
            remedy=f"{verb}: {{key: value}}",
        )
    options = flat(given or {})
    own = sorted(GIVEN & options.keys())
    if own:
        raise RecipeError(f"{own[0]!r} is for the chain to say", where=where, remedy="leave it out")
    try:
        CHECKS[verb](options)
    except SecateurError as error:
        raise type(error)(error.what, where=where, remedy=error.remedy) from None
    return verb, options


def check_recipe(recipe: PruneRecipe) -> None:
    """Check whatever of a recipe can be checked without its model.

    Raises:
        SecateurError: a part is unknown, or parts do not fit together.
    """
    method, _ = method_of(recipe)
    allocation_of(recipe, method)
    choose_device(recipe.device)
    settings_of(recipe, "memory", None)


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the verbs' functions take them: a section of a recipe is its keys."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key in SECTIONS and isinstance(value, Mapping):
            found.update({"calibration" if k == "source" else k: x for k, x in value.items()})
        else:
            found[key] = value
    return found


def begin(work: Path, wanted: Sequence[tuple[str, Mapping[str, Any]]], resume: bool) -> None:
    """Make the folder of the steps, or make sure that it is of these.

    Raises:
        RecipeError: the stopped chain had other steps.
    """
    file, plan = work / PLAN, json.dumps(wanted, default=str)
    if resume and file.read_text(encoding="utf-8") != plan:
        raise RecipeError(
            "the stopped chain had other steps",
            where=str(file),
            remedy="ask for the same as before, or discard it with --restart",
        )
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        file.write_text(plan, encoding="utf-8")


def carry_out(
    verb: str,
    options: Mapping[str, Any],
    folder: Path,
    made: Path,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """One step, gone on with where it was stopped."""
    unfinished = made.with_name(made.name + ".partial")
    begun = verb in BEGUN and (unfinished / BEGUN[verb]).exists()
    going_on = {"resume": True} if begun else {"restart": True}
    VERBS[verb](
        folder,
        output=made,
        progress=progress,
        trust_remote_code=trust_remote_code,
        **going_on,
        **options,
    )


def counted(step: str, folder: Path, seconds: float, trust_remote_code: bool) -> Link:
    """What a folder holds."""
    audit = audit_checkpoint(folder, trust_remote_code=trust_remote_code)
    zeros = sum(linear.zeros for linear in audit.linears)
    return Link(step, audit.parameters, zeros, audit.file_bytes, seconds)


def finish(last: Path, work: Path, report: ChainReport) -> None:
    """Keep the notes of every step, and give the last one's folder its name."""
    notes = last / RUN_FOLDER
    notes.mkdir(exist_ok=True)
    for folder in sorted(work.iterdir()):
        if folder.is_dir() and folder != last and (folder / RUN_FOLDER).is_dir():
            shutil.copytree(
                folder / RUN_FOLDER,
                notes / "steps" / folder.name,
                ignore=shutil.ignore_patterns("*.safetensors"),
                dirs_exist_ok=True,
            )
    write_whole(notes / "chain.json", report.to_json())
    if report.output.exists():
        shutil.rmtree(report.output)
    os.rename(last, report.output)
    shutil.rmtree(work)
