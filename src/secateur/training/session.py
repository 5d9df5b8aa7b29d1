"""One training with all its inputs, or iterative pruning, which trains in rounds.

    work/rounds/early.safetensors      the weights to go back to, with rewind `weights`
    work/rounds/dense.*                the training before the first round, with rewind `weights`
    work/rounds/round-N.*              see `secateur.training.pruning`
    work/rounds/NAME.json, NAME.jsonl  the report of a finished training, and its log

A killed run resumes at the last save of the unfinished training.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import NumericalError, RecipeError
from secateur.models.skeleton import quiet_transformers
from secateur.runs.output import write_json
from secateur.training.loop import Loop, Outcome
from secateur.training.pruning import (
    KeepEarly,
    PruningRounds,
    Round,
    prune_in_rounds,
    read_weights,
    write_weights,
)
from secateur.training.saved import Hook
from secateur.training.setup import Adapted
from secateur.training.training_plan import TrainingPlan


@dataclass(frozen=True)
class Trained:
    """The output of a training.

    Attributes:
        outcome: steps, tokens, validations.
        learning_rate: the highest learning rate.
        final: file of the float32 weights.
        log: file with a line for each step; the last one if there are several rounds.
        rounds: one entry for each training of iterative pruning; else empty.
    """

    outcome: Outcome
    learning_rate: float
    final: Path
    log: Path
    rounds: list[dict[str, Any]] = field(default_factory=list)


def run_loop(loop: Loop) -> Outcome:
    """Run a loop.

    Raises:
        NumericalError: the training failed; the message names the log, and how to resume.
    """
    try:
        with quiet_transformers():
            return loop.run()
    except NumericalError as error:
        log = loop.saved.log.file
        raise NumericalError(
            error.what,
            where=error.where,
            remedy=f"{error.remedy}; resume from the last save with --resume and a lower "
            f"--learning-rate. {log} has the loss of each step",
        ) from error


def train_once(loop: Loop, work: Path) -> Trained:
    """Train from the first step of the plan to the last. The loop saves into `work`."""
    outcome = run_loop(loop)
    rate = max((line["learning_rate"] for line in outcome.log), default=0.0)
    return Trained(outcome, rate, work / "final.safetensors", work / "log.jsonl")


MakeLoop = Callable[..., Loop]
"""`Loop` without its `plan`, `saved` and `board`: (plan, **options) → a loop."""


def train_in_rounds(
    make_loop: MakeLoop,
    adapted: Adapted,
    rounds: PruningRounds,
    plan: TrainingPlan,
    work: Path,
    board: Path | None,
) -> Trained:
    """Prune and train in rounds. A call after a kill resumes.

    Args:
        make_loop: makes the loop of each training.
        adapted: the model, its masks and hooks.
        rounds: the settings of the rounds.
        plan: length, learning rate, optimizer of one training.
        work: folder for the state of a resumed training.
        board: folder for TensorBoard's curves; None for none.

    Raises:
        RecipeError: the plan has no number of steps, or `rewind_step` is after its end.
    """
    if plan.minutes:
        raise RecipeError(
            "iterative pruning needs a number of steps for each round",
            remedy="give --steps instead of --minutes",
        )
    rounds.span(1, plan.steps)
    files = RoundFiles(work / "rounds")
    before = make_loop(plan, saved=work).validation_loss()
    early = files.folder / "early.safetensors" if rounds.rewind == "weights" else None
    if early is not None:
        _train_before(make_loop, adapted, plan, rounds.rewind_step, early, files)

    def retrain(this: Round) -> None:
        name = f"round-{this.number}"
        first, last, steps = rounds.span(this.number, plan.steps)
        loop = make_loop(
            plan.model_copy(update={"steps": steps}),
            saved=files.folder / name,
            board=None if board is None else board / name,
            first_step=first,
            last_step=last,
            label=f"round {this.number} of {this.rounds}",
        )
        files.keep(name, run_loop(loop), loop, this.sparsity)

    prune_in_rounds(adapted.model, adapted.opened, rounds, retrain, early, files.folder)
    names = ["dense"] if early is not None else []
    names += [f"round-{number}" for number in range(1, rounds.rounds + 1)]
    return files.trained(names, before)


def _train_before(
    make_loop: MakeLoop,
    adapted: Adapted,
    plan: TrainingPlan,
    step: int,
    early: Path,
    files: RoundFiles,
) -> None:
    """Train before the first round. This gives its weights, and the early weights to rewind to."""
    model, weights = adapted.model, files.folder / "dense.safetensors"
    if not step and not early.exists():
        write_weights(model, early)
    if files.report("dense").exists():
        if weights.exists():
            read_weights(model, weights)
        return
    hooks: tuple[Hook, ...] = (KeepEarly(step, early),) if step else ()
    folder = files.folder / "dense"
    loop = make_loop(plan, saved=folder, hooks=hooks, label="training before round 1")
    outcome = run_loop(loop)
    write_weights(model, weights)
    files.keep("dense", outcome, loop, adapted.masks.sparsity)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class RoundFiles:
    """The reports and logs of the trainings of a run in rounds.

    Attributes:
        folder: of the files.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def report(self, name: str) -> Path:
        """The report of a training. It exists only after the training has finished."""
        return self.folder / f"{name}.json"

    def log(self, name: str) -> Path:
        """The log of a finished training."""
        return self.folder / f"{name}.jsonl"

    def keep(self, name: str, outcome: Outcome, loop: Loop, sparsity: float) -> None:
        """Write the log and the report of a finished training."""
        lines = "".join(json.dumps(line) + "\n" for line in outcome.log)
        self.log(name).write_text(lines, encoding="utf-8", newline="\n")
        rates = [line["learning_rate"] for line in outcome.log]
        report = {
            "training": name,
            "sparsity": sparsity,
            "first_step": loop.first_step,
            "learning_rate": max(rates, default=0.0),
            "facts": outcome.facts(),
        }
        write_json(self.report(name), report)

    def trained(self, names: list[str], before: float | None) -> Trained:
        """All finished trainings together.

        Args:
            names: names of the trainings, in order.
            before: the validation loss before the first training.
        """
        reports = [json.loads(self.report(n).read_text(encoding="utf-8")) for n in names]
        whole, entries = Outcome(), []
        if before is not None:
            whole.validations.append((0, before))
        for report in reports:
            outcome = Outcome()
            outcome.take(report["facts"])
            steps, first = outcome.step - report["first_step"], report["first_step"]
            losses = [loss for _, loss in outcome.validations]
            entries.append(
                {
                    "training": report["training"],
                    "sparsity": report["sparsity"],
                    "steps": steps,
                    "tokens": outcome.tokens,
                    "perplexity_before": math.exp(losses[0]) if losses else None,
                    "perplexity_after": math.exp(outcome.best_loss) if losses else None,
                }
            )
            whole.validations += [(whole.step + s - first, x) for s, x in outcome.validations]
            if outcome.best_step is not None:
                whole.best_step = whole.step + outcome.best_step - first
            whole.best_loss = outcome.best_loss
            whole.step += steps
            whole.tokens += outcome.tokens
            whole.seconds += outcome.seconds
            whole.stopped = outcome.stopped
        rate = max(report["learning_rate"] for report in reports)
        final = self.folder / f"{names[-1]}.weights.safetensors"
        return Trained(whole, rate, final, self.log(names[-1]), entries)
