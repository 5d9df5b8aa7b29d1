"""Iterative pruning of a recipe: the rounds, their files, and their reports.

work/rounds/early.safetensors the weights to go back to, with rewind `weights`
work/rounds/dense.*               the training before the first round, with rewind `weights`
work/rounds/round-N.*             see `secateur.training.rounds`
work/rounds/NAME.json, NAME.jsonl what a finished training reports, and its log

A killed run resumes at the last save of the unfinished training.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.runs.atomic import write_json
from secateur.training.hooks import Hook
from secateur.training.loop import Loop, Outcome
from secateur.training.rounds import (
    KeepEarly,
    PruningRounds,
    Round,
    prune_in_rounds,
    read_weights,
    write_weights,
)
from secateur.training.watch import mean_loss
from secateur.workflows.train.session import Session, Trained, run_loop


def train_in_rounds(session: Session, rounds: PruningRounds) -> Trained:
    """Prune and train in rounds. A call after a kill resumes.

    Raises:
        RecipeError: the plan has no number of steps, or `rewind_step` is after its end.
    """
    plan, adapted = session.plan, session.adapted
    if plan.minutes:
        raise RecipeError(
            "iterative pruning needs a number of steps for each round",
            remedy="give --steps instead of --minutes",
        )
    rounds.span(1, plan.steps)
    files = RoundFiles(session.work / "rounds")
    before = validation_loss(session)
    early = None
    if rounds.rewind == "weights":
        early = files.place / "early.safetensors"
        train_before(session, rounds.rewind_step, early, files)

    def retrain(this: Round) -> None:
        assert this.folder is not None
        first, last, steps = rounds.span(this.number, plan.steps)
        loop = session.loop(
            this.folder,
            plan=replace(plan, steps=steps),
            board=None if session.board is None else session.board / f"round-{this.number}",
            first_step=first,
            last_step=last,
            label=f"round {this.number} of {this.rounds}",
        )
        files.keep(f"round-{this.number}", run_loop(loop), loop, this.sparsity)

    kept = adapted.opened
    prune_in_rounds(adapted.model, kept, rounds, retrain, early, files.place)
    names = ["dense"] if early is not None else []
    names += [f"round-{number}" for number in range(1, rounds.rounds + 1)]
    return files.trained(names, before)


def validation_loss(session: Session) -> float | None:
    """The next-token loss of the validation windows before any round."""
    loop = session.loop(session.work, board=None)
    if loop.validation is None or loop.next_token is None:
        return None
    size = session.plan.at_once(loop.validation.shape[1])
    return mean_loss(loop.model, loop.next_token, loop.validation, size, loop.matmuls)


def train_before(session: Session, step: int, early: Path, files: RoundFiles) -> None:
    """Train before the first round. This gives its weights, and the early weights to rewind to.

    Args:
        session: session of the run.
        step: the step to go back to; 0 for the weights of the source.
        early: file for the weights of that step.
        files: files of the rounds.
    """
    model, weights = session.adapted.model, files.place / "dense.safetensors"
    if not step and not early.exists():
        write_weights(model, early)
    if files.report("dense").exists():
        if weights.exists():
            read_weights(model, weights)
        return
    hooks: tuple[Hook, ...] = (KeepEarly(step, early),) if step else ()
    folder = files.place / "dense"
    loop = session.loop(folder, hooks=hooks, board=None, label="training before round 1")
    outcome = run_loop(loop)
    write_weights(model, weights)
    files.keep("dense", outcome, loop, session.adapted.masks.sparsity)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class RoundFiles:
    """The reports and logs of the trainings of a run in rounds.

    Attributes:
        place: their folder.
    """

    place: Path

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)

    def report(self, name: str) -> Path:
        """The report of a training. It exists only after the training has finished."""
        return self.place / f"{name}.json"

    def log(self, name: str) -> Path:
        """The log of a finished training."""
        return self.place / f"{name}.jsonl"

    def keep(self, name: str, outcome: Outcome, loop: Loop, sparsity: float) -> None:
        """Write the log and the report of a finished training."""
        lines = "".join(json.dumps(line) + "\n" for line in outcome.log)
        self.log(name).write_text(lines, encoding="utf-8")
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
            entries.append(entry(report, outcome, steps))
            whole.validations += [(whole.step + s - first, x) for s, x in outcome.validations]
            if outcome.best_step is not None:
                whole.best_step = whole.step + outcome.best_step - first
            whole.best_loss = outcome.best_loss
            whole.step += steps
            whole.tokens += outcome.tokens
            whole.seconds += outcome.seconds
            whole.stopped = outcome.stopped
        rate = max(report["learning_rate"] for report in reports)
        final = self.place / f"{names[-1]}.weights.safetensors"
        return Trained(whole, rate, final, self.log(names[-1]), entries)


def entry(report: dict[str, Any], outcome: Outcome, steps: int) -> dict[str, Any]:
    """The record of one training in the notes of the model."""
    losses = [loss for _, loss in outcome.validations]
    return {
        "training": report["training"],
        "sparsity": report["sparsity"],
        "steps": steps,
        "tokens": outcome.tokens,
        "perplexity_before": math.exp(losses[0]) if losses else None,
        "perplexity_after": math.exp(outcome.best_loss) if losses else None,
    }
