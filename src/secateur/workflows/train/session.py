"""One training with all its inputs, and its output for the files of the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import NumericalError
from secateur.models.skeleton import quiet_transformers
from secateur.progress import Progress
from secateur.training.batches import Batches
from secateur.training.loop import Loop, Outcome
from secateur.training.objectives import Objective
from secateur.training.process_group import ProcessGroup
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows
from secateur.workflows.train.adapters import Adapted


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


@dataclass(frozen=True)
class Session:
    """All inputs of a training.

    Attributes:
        adapted: the model, its masks and hooks.
        batches: the windows of each step.
        objective: the loss.
        plan: length, learning rate, optimizer.
        validation: validation windows; None for none.
        work: folder for the state of a resumed training.
        progress: receives every step.
        processes: the processes.
        board: folder for TensorBoard's curves; None for none.
    """

    adapted: Adapted
    batches: Batches
    objective: Objective
    plan: TrainingPlan
    validation: Windows | None
    work: Path
    progress: Progress
    processes: ProcessGroup
    board: Path | None = None

    def loop(self, saved: Path, **options: Any) -> Loop:
        """Make a loop that saves into a folder. `options` are arguments of `Loop`."""
        adapted = self.adapted
        values = {"plan": self.plan, "hooks": adapted.hooks, "board": self.board, **options}
        return Loop(
            adapted.model,
            self.batches,
            self.objective,
            adapted.held,
            validation=self.validation,
            saved=saved,
            progress=self.progress,
            processes=self.processes,
            **values,
        )

    def run(self) -> Trained:
        """Train once, from the first step of the plan to the last."""
        outcome = run_loop(self.loop(self.work))
        rate = max((line["learning_rate"] for line in outcome.log), default=0.0)
        work = self.work
        return Trained(outcome, rate, work / "final.safetensors", work / "log.jsonl")


def run_loop(loop: Loop) -> Outcome:
    """Run a loop.

    Raises:
        NumericalError: the training failed; the message names the log, and how to resume.
    """
    with quiet_transformers(), naming_the_log(loop):
        return loop.run()


@contextmanager
def naming_the_log(loop: Loop) -> Iterator[None]:
    """Add the log of a failed training to its error, and how to resume."""
    try:
        yield
    except NumericalError as error:
        log = loop.saved.log.file
        raise NumericalError(
            error.what,
            where=error.where,
            remedy=f"{error.remedy}; resume from the last save with --resume and a lower "
            f"--learning-rate. `secateur diagnose --training-log {log}` reads the log",
        ) from error
