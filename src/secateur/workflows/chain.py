"""A chain: cut, prune, train, compress, one after the other, with one account of what is left.

Each step is what its verb does, from the folder of the step before. A step's folder is there whole
or not at all, so a killed chain goes on with the step it was in, which goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.diagnostics.audit import audit_checkpoint
from secateur.errors import RecipeError, SecateurError
from secateur.models.checkpoint import shard_files
from secateur.models.sources import resolve
from secateur.progress import Progress, Silent
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
from secateur.reporting.results.chain import ChainResult
from secateur.runs.atomic import write_json
from secateur.runs.folder import NOTES, RunFolder
from secateur.runs.identity import file_digests
from secateur.runs.records import Chain, ChainStep, declared, read_record
from secateur.workflows.compress.options import check_compression
from secateur.workflows.compress.pack import compress
from secateur.workflows.prune.checkpoint import prune
from secateur.workflows.prune.prepare import allocation_of, choose_device, method_of, settings_of
from secateur.workflows.structure.checkpoint import structure
from secateur.workflows.train.checkpoint import distill, retrain

__all__ = ["chain"]

VERBS: Mapping[str, Callable[..., Any]] = {
    "structure": structure,
    "prune": prune,
    "retrain": retrain,
    "distill": distill,
    "compress": compress,
}
"""What a step can be."""

CHAIN = "chain.json"

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
) -> ChainResult:
    """Carry out several verbs, each on what the one before it made.

    Args:
        model: hub id, folder, GGUF file or named sample.
        output: the folder of the last step's model.
        steps: each a verb (structure, prune, retrain, distill, compress) with its options. The
            teacher of a distillation is the chain's model, unless another is named.
        resume: go on with a stopped chain; start, if there is none.
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
    folder = RunFolder(output, "chain", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(model)
    source = resolve(str(model), trust_remote_code=trust_remote_code)
    folder.keep_apart(source.folder)
    for verb, options in wanted:
        if verb == "distill":  # whatever was cut and pruned since
            options.setdefault("teacher", str(model))
    with folder:
        folder.worth_resuming = lambda: any(folder.work.iterdir())
        weights = file_digests(shard_files(source.folder))
        folder.begin({"model": str(model), "steps": wanted, "source_files": weights})
        if not folder.finished:
            links = carry_out(wanted, source.folder, folder, trust_remote_code, progress)
            report = ChainResult(links, folder.output)
            gather_notes(folder)
            write_json(folder.notes / CHAIN, declared(Chain, report.to_json()))
            folder.finish()
    return read_report(folder.output)


def carry_out(
    wanted: Sequence[tuple[str, Mapping[str, Any]]],
    source: Path,
    folder: RunFolder,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[ChainStep, ...]:
    """All steps, as far as an earlier run has not; what is left after each.

    The account of a step is written when its folder is whole. When all accounts are there, the
    folder of the last step becomes the result.
    """
    before = source
    links = [counted("source", source, 0.0, trust_remote_code)]
    for number, (verb, options) in enumerate(wanted, start=1):
        made = folder.work / f"{number:02d}-{verb}"
        account = made.with_suffix(".json")
        if not account.exists():
            started = time.perf_counter()
            if not made.exists():
                VERBS[verb](
                    before,
                    output=made,
                    progress=progress,
                    trust_remote_code=trust_remote_code,
                    resume=True,
                    **options,
                )
            seconds = time.perf_counter() - started
            write_json(account, counted(verb, made, seconds, trust_remote_code).to_json())
        links.append(read_record(ChainStep, account))
        before = made
    if before.exists():
        shutil.rmtree(folder.model)
        before.rename(folder.model)
    return tuple(links)


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


def counted(step: str, folder: Path, seconds: float, trust_remote_code: bool) -> ChainStep:
    """What a folder holds."""
    audit = audit_checkpoint(folder, trust_remote_code=trust_remote_code)
    zeros = sum(linear.zeros for linear in audit.linears)
    return ChainStep(
        step=step,
        parameters=audit.parameters,
        zeros=zeros,
        file_bytes=audit.file_bytes,
        seconds=seconds,
        kept=audit.parameters - zeros,
    )


def gather_notes(folder: RunFolder) -> None:
    """Keep the notes of every step but the last beside those of the result."""
    for step in sorted(folder.work.iterdir()):
        if (step / NOTES).is_dir():
            shutil.copytree(
                step / NOTES,
                folder.notes / "steps" / step.name,
                ignore=shutil.ignore_patterns("*.safetensors"),
                dirs_exist_ok=True,
            )


def read_report(output: Path) -> ChainResult:
    """The account that lies in a chain's result."""
    return ChainResult(read_record(Chain, output / NOTES / CHAIN).links, output)
