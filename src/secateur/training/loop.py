"""The training loop: batch, loss, gradients, masks, step; watched, saved, and able to go on."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.allocator import TRAINING_BLOCK_BYTES, TRAINING_BYTES, reused_pages
from secateur.engine.prune.tuning import in_float32, to_float32
from secateur.engine.stream.attention import WrittenOut
from secateur.errors import NumericalError, RecipeError, SourceError
from secateur.models.architecture import hidden_size
from secateur.precision import exact_matmuls, fast_matmuls, full_float32
from secateur.progress import Progress, Silent
from secateur.training.batches import Batch, Batches
from secateur.training.masks import Masks
from secateur.training.objectives import NextToken, Objective
from secateur.training.outcome import Outcome
from secateur.training.process_group import ProcessGroup, checkpointed
from secateur.training.saved import Saved
from secateur.training.tensorboard_log import TensorBoardLog
from secateur.training.training_plan import TrainingPlan

__all__ = ["Hook", "Loop", "Outcome", "train"]

WATCHED = 10
SUSPECT, NOISE = 1.5, 0.1
TICKS = 1000
"""Of the progress bar, where the clock says how much is done."""


class Hook(Protocol):
    """Something that is done after every step."""

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`."""
        ...


class Loop:
    """One training, which can be stopped and gone on with.

    Args:
        model: a causal language model, in eval mode: dropout is not used.
        batches: what each step reads.
        objective: the loss.
        masks: held at every step; None for a dense model.
        how: length, learning rate, optimizer.
        validation: token ids [windows, length]; their next-token loss is watched, and the model
            ends with the weights that were best. None watches nothing.
        saved: folder for all that is needed to go on; None for none.
        hooks: called after every step.
        progress: told of every step.
        first_step: where to begin in the schedule and the order of batches.
        processes: the processes that train together; made if None.
        identity: everything the result depends on; a run that goes on must have the same.
        board: folder that takes curves for TensorBoard; None for none.
        trained: names of the parameters that learn; None for all that have a rate.
        label: what the progress bar calls it.

    Raises:
        RecipeError: the masks are not of this model, or hooks are given without steps.
        SourceError: there is nothing to read.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        objective: Objective,
        masks: Masks | None,
        how: TrainingPlan,
        *,
        validation: Tensor | None = None,
        saved: Path | None = None,
        hooks: Sequence[Hook] = (),
        progress: Progress | None = None,
        first_step: int = 0,
        processes: ProcessGroup | None = None,
        identity: dict[str, Any] | None = None,
        board: Path | None = None,
        trained: frozenset[str] | None = None,
        label: str = "training",
    ) -> None:
        self.model, self.batches, self.objective, self.how = model, batches, objective, how
        self.masks, self.hooks = masks, hooks
        self.trained, self.label = trained, label
        self.progress = progress or Silent()
        self.device = next(model.parameters()).device
        self.processes = processes or ProcessGroup(self.device)
        if not len(batches.windows):
            raise SourceError("there is no text to train on", remedy="name a longer text")
        if masks is not None:
            masks.fit(model)
        if hooks and (how.minutes or self.processes.ranks > 1):
            raise RecipeError(
                "hooks need a number of steps, and a single process",
                remedy="train by steps instead of minutes, in one process",
            )
        if batches.size % self.processes.ranks:
            raise RecipeError(
                f"{batches.size} windows in a step cannot be shared by "
                f"{self.processes.ranks} processes",
                remedy="give a batch that is a multiple of the processes",
            )
        self.first_step = first_step
        self.validation = validation
        self.judge = NextToken.of(model) if validation is not None else None
        self.tokens_of_step = batches.size * batches.windows.shape[1]
        self.peak = how.peak(hidden_size(model), self.tokens_of_step)
        self.saved = Saved(saved, self.processes, identity or {})
        self.board_folder = board if self.processes.main else None
        self.board: TensorBoardLog | None = None
        self.outcome = Outcome(step=first_step)
        self.last_step_seconds = self.last_validation_seconds = 0.0
        self.lowest, self.watched = math.inf, 0

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train the model in place, weights in float32 meanwhile.

        Returns:
            What was done. The model has the best weights if there was validation, else the last.

        Raises:
            NumericalError: a loss or gradient is not a number, or the loss has doubled; what was
                saved before is there still.
            VerificationError: the masks were not held.
        """
        trained = {
            n
            for n, p in self.model.named_parameters()
            if p.is_floating_point() and self.how.factor(n)
            if self.trained is None or n in self.trained
        }
        if not trained:
            raise RecipeError("no parameter is trained", remedy="see the rates")
        with ExitStack() as stack:
            stack.enter_context(full_float32())  # also in backwards, which no autocast covers
            stack.enter_context(reused_pages(TRAINING_BLOCK_BYTES, TRAINING_BYTES))
            self.processes.shard(self.model, to_float32)
            stack.enter_context(in_float32(self.model, trained))
            if self.how.gradient_checkpointing:
                stack.enter_context(checkpointed(self.model))
            self.begin()
            if self.board is not None:
                stack.callback(self.board.close)
            self.train()
            self.end()
        return self.outcome

    def begin(self) -> None:
        """Apply the masks, make the optimizer, and go on from what was saved."""
        if self.masks is not None:
            self.masks = self.masks.held_in(self.model)
            self.masks.apply(self.model)
        self.model.eval()
        named = self.model.named_parameters()
        self.parameters = {n: p for n, p in named if p.requires_grad}
        self.optimizer = self.how.make_optimizer(self.parameters.items())
        changing = self.masks if self.hooks else None
        facts = self.saved.load_state(self.parameters, self.optimizer, changing)
        if facts is not None:
            self.outcome.take(facts)
        self.outcome.log = self.saved.log.lines
        if self.board_folder is not None:
            self.board = TensorBoardLog(self.board_folder, self.outcome.step)
        self.started = time.perf_counter() - self.processes.same(self.outcome.seconds)
        self.saved_at = time.perf_counter()

    def train(self) -> None:
        """All steps that are left."""
        by_clock = bool(self.how.minutes)
        self.progress.start(self.label, TICKS if by_clock else self.how.steps)
        self.told = 0
        self.tell(0.0)
        if self.validation is not None and not self.outcome.validations:
            self.validate()
        while not self.over():
            begun = time.perf_counter()
            due = self.validations_due()
            self.step()
            self.last_step_seconds = time.perf_counter() - begun
            if self.validations_due() > due:
                self.validate()
            self.save_now_and_then()
        self.progress.finish()

    def end(self) -> None:
        """The last validation; the best weights; the masks looked at once more."""
        validations = self.outcome.validations
        if self.validation is not None and validations[-1][0] != self.outcome.step:
            self.validate()
        self.save()  # a run that is killed from here on is not trained again
        if self.validation is not None:
            self.saved.restore_best(self.parameters)
        if self.masks is not None:
            self.masks.check(self.model)
        self.outcome.seconds = time.perf_counter() - self.started
        self.saved.keep_final(self.parameters)

    def over(self) -> bool:
        """Whether the run is; says why."""
        if self.outcome.stopped == "patience":
            return True
        if not self.how.minutes:
            self.outcome.stopped = "steps" if self.outcome.step >= self.how.steps else ""
        else:
            ahead = self.last_step_seconds + self.last_validation_seconds
            left = 60 * self.how.minutes - self.clock() - ahead
            self.outcome.stopped = "minutes" if self.processes.same(left) <= 0 else ""
        return bool(self.outcome.stopped)

    def clock(self) -> float:
        """Seconds of all runs together."""
        return time.perf_counter() - self.started

    def done(self) -> tuple[float, float]:
        """The share of the run that is over, and the share that a step takes."""
        if not self.how.minutes:
            return self.outcome.step / self.how.steps, 1 / self.how.steps
        seconds = 60 * self.how.minutes
        done, share = self.clock() / seconds, max(self.last_step_seconds / seconds, 1e-3)
        return self.processes.same(done), self.processes.same(share)

    # -- one step --------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of the optimizer, with the masks held."""
        outcome, how = self.outcome, self.how
        rate = how.rate(*self.done(), self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss = self.backward()
        if self.masks is not None:
            self.masks.hold_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), how.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.refuse(float(norm), "the norm of the gradient")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masks is not None:
            self.masks.hold(self.model, self.optimizer)
        outcome.step += 1
        outcome.tokens += self.tokens_of_step
        told = {"loss": loss, "learning_rate": rate, "gradient_norm": float(norm)}
        self.saved.log.add({"step": outcome.step, **told})
        self.draw({f"training/{name}": value for name, value in told.items()})
        for hook in self.hooks:
            hook.on_step(outcome.step, how.steps, self.model, self.optimizer)
        self.refuse_divergence()
        self.tell(loss)

    def backward(self) -> float:
        """Gradients of all parts of a step; the loss, a mean over all processes."""
        size = self.how.at_once(self.batches.windows.shape[1])
        processes = self.processes
        parts = self.batches.micro(
            self.outcome.step, size, self.device, processes.rank, processes.ranks
        )
        total = 0.0
        for part in parts:
            share = len(part.numbers) * processes.ranks / self.batches.size
            with self.matmuls(), self.attention(), torch.enable_grad():
                loss = self.objective(self.model, part) * share
            total += loss.item()
            loss.backward()
        return self.refuse(processes.mean(total), "the loss")

    def matmuls(self) -> AbstractContextManager[Any]:
        """The precision of products."""
        return (fast_matmuls if self.how.fast_matmuls else exact_matmuls)(self.device)

    def attention(self) -> AbstractContextManager[Any]:
        """How a part of a step attends."""
        quick = self.how.writes_out(self.device, self.batches.windows.shape[1])
        return WrittenOut() if quick else nullcontext()

    # -- what is watched -------------------------------------------------------------------------

    def refuse(self, value: float, what: str) -> float:
        """A number that training cannot do without.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        if not math.isfinite(value):
            self.fail(f"{what} is {value}", {"step": self.outcome.step + 1, "loss": None})
        return value

    def refuse_divergence(self) -> None:
        """The median of the last losses may not be `diverged` times the lowest that it has been.

        A tenth of the first one is added, so that a loss near 0 may jump about.

        Raises:
            NumericalError: it is more.
        """
        log = self.outcome.log
        for end in range(max(WATCHED, self.watched + 1), len(log) + 1):
            last = statistics.median(line["loss"] for line in log[end - WATCHED : end])
            self.lowest, self.watched = min(self.lowest, last), end
        allowed = self.how.diverged * self.lowest + NOISE * log[0]["loss"]
        if self.watched and self.how.diverged and last > allowed:
            self.fail(
                f"the loss has risen from {self.lowest:.3g} to {last:.3g} (medians of {WATCHED} "
                "steps): training diverges",
                None,
            )

    def fail(self, what: str, line: dict[str, Any] | None) -> None:
        """End a training that has gone wrong, with the best weights if any were kept."""
        if line is not None:
            self.saved.log.add(line)
        if self.outcome.best_step is not None:
            self.saved.restore_best(self.parameters)
        kept = "" if self.saved.folder is None else f", what was saved is in {self.saved.folder}"
        raise NumericalError(
            what,
            where=f"step {self.outcome.step} of training, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.2g}{kept}",
            remedy="train with a third of the learning rate, or with a longer warm-up",
        )

    @torch.no_grad()
    def validate(self) -> None:
        """The next-token loss of the validation windows; the best weights are kept."""
        assert self.validation is not None
        assert self.judge is not None
        begun, total = time.perf_counter(), 0.0
        size = self.how.at_once(self.validation.shape[1])
        for ids in self.validation.split(size):
            with self.matmuls():
                total += self.judge(self.model, Batch(ids.to(self.device), ())).item() * len(ids)
        self.processes.reshard(self.model)
        outcome = self.outcome
        loss = self.refuse(self.processes.same(total / len(self.validation)), "the validation loss")
        outcome.validations.append((outcome.step, loss))
        self.draw({"validation/loss": loss})
        kept = (
            sum(int(m.sum()) for m in self.masks.kept.values()) if self.hooks and self.masks else -1
        )
        if loss < outcome.best_loss or kept != outcome.best_kept:
            outcome.best_loss, outcome.best_step, outcome.best_kept = loss, outcome.step, kept
            self.saved.keep_best(self.parameters)
        steps = [step for step, _ in outcome.validations]
        if self.how.patience and outcome.best_step is not None:
            after = sum(step > outcome.best_step for step in steps)
            outcome.stopped = "patience" if after >= self.how.patience else ""
        self.last_validation_seconds = time.perf_counter() - begun

    def validations_due(self) -> int:
        """How many validations of the run should be behind us."""
        if self.validation is None:
            return 0
        return int(self.done()[0] * self.how.validations + 1e-9)

    def save_now_and_then(self) -> None:
        """Save what is needed to go on, if it is time.

        Not while the loss is suspiciously high: what was saved before is to survive a divergence.
        """
        log = self.outcome.log
        suspicious = SUSPECT * self.lowest + NOISE * log[0]["loss"]
        if self.watched and self.how.diverged and log[-1]["loss"] > suspicious:
            return
        waited = time.perf_counter() - self.saved_at >= 60 * self.how.save_minutes
        if self.saved.folder is not None and self.processes.same(float(waited)):
            self.save()

    def save(self) -> None:
        """Save what is needed to go on."""
        if self.masks is not None:
            self.masks.check(self.model, self.optimizer)
        self.outcome.seconds = self.clock()
        changing = self.masks if self.hooks else None
        self.saved.save_state(self.parameters, self.optimizer, changing, self.outcome.facts())
        self.saved_at = time.perf_counter()

    def draw(self, values: dict[str, float]) -> None:
        """Points for TensorBoard, if it was asked for."""
        if self.board is not None:
            self.board.add(self.outcome.step, values)

    def tell(self, loss: float) -> None:
        """Tell the progress bar of what is done."""
        outcome = self.outcome
        if self.how.minutes:
            place = min(TICKS, int(TICKS * self.clock() / (60 * self.how.minutes)))
        else:
            place = outcome.step
        note = f"loss {loss:.3f}" if loss else ""
        if outcome.validations:
            note += f", validation {math.exp(min(outcome.validations[-1][1], 700)):.2f}"
        if self.last_step_seconds:
            rate = self.tokens_of_step / self.last_step_seconds
            note += f", {rate:.0f} tokens/s"
        self.progress.step(place - self.told, note)
        self.told = place


def train(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    masks: Masks | None,
    how: TrainingPlan,
    saved: Path | None = None,
    hooks: Sequence[Hook] = (),
    **options: Any,
) -> Outcome:
    """Train a model in place: `Loop(...).run()`; the arguments are those of `Loop`."""
    return Loop(model, batches, objective, masks, how, saved=saved, hooks=hooks, **options).run()
