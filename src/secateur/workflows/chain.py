"""A chain runs several verbs in order (cut, prune, train, compress) and reports each step.

Each step reads the folder of the previous step. A step's folder is complete, or it does not exist.
So a killed chain resumes with its unfinished step, and that step resumes where it stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.diagnostics.audit import audit_checkpoint
from secateur.errors import RecipeError
from secateur.models.checkpoint import shard_files
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.progress import Labelled, Progress, listener
from secateur.publishing import without_folders
from secateur.recipes.chain import ChainRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.reading import dump_recipe
from secateur.reporting.front_matter import source_name
from secateur.reporting.results.prune import ChainResult
from secateur.runs.atomic import write_json, write_text
from secateur.runs.folder import NOTES, STATE, RunFolder, file_digests, refuse_another
from secateur.runs.records import Chain, ChainStep, declared, read_record
from secateur.workflows.chain_steps import PlannedStep, check_cuts, checked_steps

CHAIN, RECIPE = "chain.json", "recipe.yaml"
BEGUN = "begun.json"


@takes_options_of(ChainRecipe)
def chain(model: str | Path, *, progress: Progress | None = None, **options: Any) -> ChainResult:
    """Carry out several verbs. Each reads the result of the previous one.

    Args:
        model: hub id, folder, GGUF file or named sample.
        progress: receives every step.
        **options: the other options of the recipe.

    Raises:
        SecateurError: a step is wrong; all are checked before the first one runs.
    """
    recipe, call = recipe_of(ChainRecipe, {"model": model}, options)
    return run_chain(recipe, listener(progress), **call)


def run_chain(
    recipe: ChainRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
) -> ChainResult:
    """Carry out a recipe into a new folder.

    A stopped chain can resume with different steps if its finished steps are the same.

    Args:
        recipe: recipe of the chain.
        progress: receives every step.
        resume: resume a stopped chain, or start if there is none.
        restart: discard the files of a stopped chain.
        overwrite: replace an existing output folder.

    Raises:
        SecateurError: a step is wrong; all are checked before the first one runs.
    """
    steps = checked_steps(recipe.steps)
    folder = RunFolder(recipe.output, "chain", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(recipe.model)
    source = resolve(recipe.model, trust_remote_code=recipe.trust_remote_code, progress=progress)
    folder.keep_apart(source.folder)
    check_cuts(steps, source.folder, recipe.trust_remote_code)
    with folder:
        weights = file_digests(shard_files(source.folder), progress)
        asked = {"steps": [step.asked for step in steps]}  # may change while the chain is stopped
        folder.begin({"model": recipe.model, "source_files": weights}, asked)
        if not folder.finished:
            links = carry_out(
                steps, recipe.model, source.folder, folder, recipe.trust_remote_code, progress
            )
            report = ChainResult(links, folder.output)
            gather_notes(folder)
            name_the_ends(folder, recipe, source)
            write_json(folder.notes / CHAIN, declared(Chain, report.to_json()))
            folder.finish()
    return read_report(folder.output)


def check_done(steps: Sequence[PlannedStep], folder: RunFolder) -> list[Any]:
    """Refuse to resume a chain if one of its finished steps differs.

    Returns:
        The recorded recipes of all steps that have begun.

    Raises:
        RecipeError: a finished step differs; the message names the step and the difference.
    """
    file = folder.work / BEGUN
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for number, asked in enumerate(begun, start=1):
        now = steps[number - 1].asked if number <= len(steps) else {}
        [verb] = asked
        made = folder.work / f"{number:02d}-{verb}"
        if made.exists() or made.with_suffix(".json").exists():
            try:
                refuse_another(asked, now, folder.partial)
            except RecipeError as error:
                where = f"step {number}, {verb}"
                raise RecipeError(error.what, where=where, remedy=error.remedy) from None
    return begun


def carry_out(
    steps: Sequence[PlannedStep],
    model: str,
    source: Path,
    folder: RunFolder,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[ChainStep, ...]:
    """Run the steps that no earlier run finished. Return the report of each step.

    The recipe of a step is written before it begins. Its report is written when its folder is
    complete. When all reports exist, the folder of the last step becomes the result.
    """
    begun = check_done(steps, folder)
    before: str | Path = model  # the first step reports the model under the user's name
    links = [counted("source", source, 0.0, trust_remote_code, progress)]
    for step in steps:
        made = folder.work / f"{step.number:02d}-{step.verb}"
        account = made.with_suffix(".json")
        if not account.exists():
            started = time.perf_counter()
            labelled = Labelled(progress, f"{step.number}/{len(steps)} {step.verb}")
            if not made.exists():
                another = begun[step.number - 1 :][:1] not in ([], [step.asked])
                begun = [*begun[: step.number - 1], step.asked]
                write_json(folder.work / BEGUN, begun)
                step.run(
                    before, made, labelled, trust_remote_code, resume=not another, restart=another
                )
            seconds = time.perf_counter() - started
            write_json(
                account, counted(step.verb, made, seconds, trust_remote_code, labelled).to_json()
            )
        links.append(read_record(ChainStep, account))
        before = made
    if made.exists():
        shutil.rmtree(folder.model)
        made.rename(folder.model)
    return tuple(links)


def name_the_ends(folder: RunFolder, recipe: ChainRecipe, source: LocalCheckpoint) -> None:
    """Write the recipe of the chain, and name its model and its output in card and records.

    The steps have named their own folders, which are gone. Only the last one is the output; the
    others stand for the model of the chain.
    """
    steps = [f"{number:02d}-{next(iter(step))}" for number, step in enumerate(recipe.steps, 1)]
    ends = dict.fromkeys((str(folder.work / name) for name in steps), source.name)
    ends[str(folder.work / steps[-1])] = str(folder.output)
    for file in sorted(folder.notes.rglob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, ends_named(found, ends, source))
    whole = dump_recipe(recipe)
    write_text(folder.notes / RECIPE, whole)
    card, model = folder.model / "README.md", source_name(source.record())
    text = card.read_text(encoding="utf-8")
    for name in steps[:-1]:
        for around in (("# ", ","), ("| source | `", "`")):
            text = text.replace(name.join(around), model.join(around))
    for name in steps:
        text = text.replace(name, folder.output.name)
    made = "## Make it again\n\n`secateur chain recipe.yaml` with `recipe.yaml`:\n\n```yaml\n"
    made += f"{without_folders(whole)}```\n"
    first, *others = re.split(r"## Make it again\n.*?```yaml\n.*?```\n", text, flags=re.DOTALL)
    write_text(card, made.join((first, "".join(others))))


def ends_named(value: Any, ends: Mapping[str, str], source: LocalCheckpoint) -> Any:
    """A record in which the folders of steps are replaced by the chain's model or its output."""
    if isinstance(value, dict):
        if value.get("kind") == "folder" and value.get("name") in ends:
            return source.record()
        return {key: ends_named(x, ends, source) for key, x in value.items()}
    if isinstance(value, list):
        return [ends_named(x, ends, source) for x in value]
    return ends.get(value, value) if isinstance(value, str) else value


def counted(
    step: str, folder: Path, seconds: float, trust_remote_code: bool, progress: Progress
) -> ChainStep:
    """Describe the contents of a folder."""
    audit = audit_checkpoint(folder, trust_remote_code=trust_remote_code, progress=progress)
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
    """Copy the notes of every step except the last beside the notes of the result."""
    for step in sorted(folder.work.iterdir()):
        if (step / NOTES).is_dir():
            shutil.copytree(
                step / NOTES,
                folder.notes / "steps" / step.name,
                ignore=shutil.ignore_patterns("*.safetensors", STATE),
                dirs_exist_ok=True,
            )


def read_report(output: Path) -> ChainResult:
    """Read the report in the result of a chain."""
    return ChainResult(read_record(Chain, output / NOTES / CHAIN).links, output)
