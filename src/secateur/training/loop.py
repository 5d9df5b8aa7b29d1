"""The training loop: batch, loss, gradients, masks, step. It validates, saves and resumes.

It ends a training that diverges (`_DivergenceWatch`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur import machine
from secateur.engine.prune import reconstruction
from secateur.errors import NumericalError, RecipeError
from secateur.models import architecture, attention, skeleton
from secateur.progress import Progress, Silent
from secateur.training.batches import Batches
from secateur.training.masks import Masks
from secateur.training.objectives import Objective, next_token
from secateur.training.process_group import ProcessGroup, checkpointed
from secateur.training.saved import Hook, Saved
from secateur.training.training_plan import TrainingPlan, shared_batch

TICKS = 1000
"""Units of the progress bar when the clock sets the length of a training."""


@dataclass(frozen=True)
class TrainingTask:
    """What is learned: a model, its windows, the loss, and the zeros that stay.

    Args:
        model: a causal language model in eval mode, without dropout.
        batches: the windows of each step.
        objective: the loss.
        masks: the masks that the loop holds at every step.
        validation: windows whose next-token loss the loop measures. The model then ends with the
            weights of the lowest loss. None: no validation.
        hooks: work after every step.
        trained: names of the trained parameters; None for all with a learning rate above 0.
    """

    model: Any
    batches: Batches
    objective: Objective
    masks: Masks = field(default_factory=lambda: Masks({}))
    validation: Batches | None = None
    hooks: Sequence[Hook] = ()
    trained: frozenset[str] | None = None


class Loop:
    """One training. It can stop and resume.

    Args:
        task: what is learned.
        plan: length, learning rate, optimizer.
        saved: folder for the state that a resumed training needs; None saves nothing.
        progress: receives every step.
        processes: the processes that train together; None makes them.
        label: the title of the progress bar.

    Raises:
        RecipeError: hooks come without a number of steps, or the processes cannot share a batch.
    """

    def __init__(
        self,
        task: TrainingTask,
        plan: TrainingPlan,
        *,
        saved: Path | None = None,
        progress: Progress | None = None,
        processes: ProcessGroup | None = None,
        label: str = "training",
    ) -> None:
        self.task, self.plan, self.label = task, plan, label
        self.model, self.masks, self.hooks = task.model, task.masks, task.hooks
        self.progress = progress or Silent()
        device = next(task.model.parameters()).device
        self.processes = processes or ProcessGroup.launched(device)
        self.device = self.processes.device  # parameters may be on the host
        self.check()
        self.last_step = plan.last_step or plan.steps
        self.next_token = next_token(task.model)
        self.length = task.batches.windows.shape[1]
        self.tokens_of_step = task.batches.size * self.length
        self.peak = plan.peak(architecture.hidden_size(task.model), self.tokens_of_step)
        self.saved = Saved(saved, self.processes)
        self.outcome = Outcome(step=plan.first_step, folder=saved)
        self.last_step_seconds = self.last_validation_seconds = 0.0
        self.watch = _DivergenceWatch(plan.diverged)

    def check(self) -> None:
        """Refuse a training that cannot run.

        Raises:
            RecipeError: hooks come without a number of steps, or
                the processes cannot share a batch.
        """
        if self.hooks and (self.plan.minutes or self.processes.count > 1):
            raise RecipeError(
                "hooks need a number of steps, and a single process",
                remedy="train by steps instead of minutes, in one process",
            )
        shared_batch(self.task.batches.size, self.processes.count)

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train the model in place, with weights in float32.

        Returns:
            The outcome of the training. The model has the best weights if there was validation,
            else the last ones.

        Raises:
            NumericalError: a loss or gradient is not a number, or the training diverged. The
                earlier saved state remains.
            VerificationError: a pruned weight is not zero.
        """
        named, among = self.model.named_parameters(), self.task.trained
        trained = {
            n
            for n, p in named
            if p.is_floating_point() and self.plan.factor(n) and (among is None or n in among)
        }
        if not trained:
            raise RecipeError("no parameter is trained", remedy="see the rates")
        with ExitStack() as stack:
            stack.enter_context(skeleton.quiet_transformers())
            stack.enter_context(machine.full_float32())  # autocast does not cover backwards
            stack.enter_context(machine.reused_training_pages())
            # Sharding comes first: each unit becomes float32 just before it is divided, so no
            # process ever holds all weights in float32.
            rounded = machine.fast_dtype(self.device) if self.plan.fast_matmuls else None
            self.processes.shard(self.model, reconstruction.to_float32, gathered=rounded)
            stack.enter_context(reconstruction.in_float32(self.model, trained))
            if self.plan.gradient_checkpointing:
                stack.enter_context(checkpointed(self.model))
            self.begin()
            self.train()
            self.end()
        return self.outcome

    def begin(self) -> None:
        """Apply the masks, make the optimizer, and load the state of an earlier run."""
        self.masks = self.masks.held_in(self.model)
        self.masks.apply(self.model)
        self.model.eval()
        # by name, because FSDP2 has put new parameters in the place of those that were given
        named = self.model.named_parameters()
        self.parameters = {n: p for n, p in named if p.requires_grad}
        self.optimizer = self.plan.make_optimizer(self.parameters.items())
        facts = self.saved.load_state(self.parameters, self.optimizer, self.hooks)
        self.saved.log.begin(facts["step"] if facts is not None else 0)
        if facts is not None:
            self.outcome.take(facts)
        self.outcome.log = self.saved.log.lines
        # all processes count from the same beginning, or `over` could differ between them
        self.started = time.perf_counter() - self.processes.once(lambda: self.outcome.seconds)
        self.saved_at = time.perf_counter()

    def train(self) -> None:
        """Do the remaining steps."""
        count = self.last_step - self.plan.first_step
        self.progress.start(self.label, TICKS if self.plan.minutes else count)
        self.reported = 0
        self.report(0.0)
        if not self.outcome.validations:
            self.validate()
        while not self.over():
            begun = time.perf_counter()
            due = self.validations_due()
            self.step()
            self.last_step_seconds = time.perf_counter() - begun
            if self.validations_due() > due:
                self.validate()
            self.save_if_due()
        self.progress.finish()

    def end(self) -> None:
        """Validate once more, restore the best weights, and check the masks."""
        if not self.outcome.validations or self.outcome.validations[-1][0] != self.outcome.step:
            self.validate()
        self.save()  # a run killed after this point does not train again
        if self.task.validation is not None:
            self.saved.restore_best(self.parameters)
        self.masks.check(self.model)
        self.outcome.seconds = time.perf_counter() - self.started
        self.saved.write("final", self.parameters)  # the checkpoint is made from them

    def over(self) -> bool:
        """Return whether the training ends, and set the reason."""
        if not self.plan.minutes:
            self.outcome.stopped = "steps" if self.outcome.step >= self.last_step else ""
        else:
            # stop where one more step, and the validation at the end, would pass the limit
            ahead = self.last_step_seconds + self.last_validation_seconds
            left = 60 * self.plan.minutes - self.clock() - ahead
            self.outcome.stopped = "minutes" if self.processes.once(lambda: left) <= 0 else ""
        return bool(self.outcome.stopped)

    def clock(self) -> float:
        """Seconds of this run and of the runs that it resumes."""
        return time.perf_counter() - self.started

    def done(self) -> tuple[float, float]:
        """The finished share of the plan, and the share of one step."""
        if not self.plan.minutes:
            return self.outcome.step / self.plan.steps, 1 / self.plan.steps
        seconds = 60 * self.plan.minutes
        done, share = self.clock() / seconds, max(self.last_step_seconds / seconds, 1e-3)
        return self.processes.once(lambda: (done, share))

    # -- one step --------------------------------------------------------------------------------

    def step(self) -> None:
        """Do one step of the optimizer, and hold the masks."""
        outcome, plan = self.outcome, self.plan
        rate = plan.rate(*self.done(), self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss = self.backward()
        # before the clipping, so that gradients of pruned weights do not count in the norm
        self.masks.hold_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), plan.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.refuse(float(norm), "the norm of the gradient")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.masks.hold(self.model, self.optimizer)
        outcome.step += 1
        outcome.learning_rate = max(outcome.learning_rate, rate)
        outcome.tokens += self.tokens_of_step
        line = {"loss": loss, "learning_rate": rate, "gradient_norm": float(norm)}
        self.saved.log.add({"step": outcome.step, **line})
        for hook in self.hooks:
            hook.on_step(outcome.step, plan.steps, self.model, self.optimizer)
        fault = self.watch.fault(outcome.log)
        if fault is not None:
            self.fail(fault, None)
        self.report(loss)

    def backward(self) -> float:
        """Add up the gradients of all parts of a step. Return the mean loss of all processes."""
        batches, processes = self.task.batches, self.processes
        size, ranks = self.plan.at_once(self.length), (processes.rank, processes.count)
        written_out = self.plan.writes_out(self.device, self.length)
        total = 0.0
        for part in batches.parts(batches.numbers(self.outcome.step), size, self.device, *ranks):
            # FSDP averages gradients over the processes; so a part counts `count` times its share
            share = len(part.numbers) * processes.count / batches.size
            attending = attention.WrittenOut() if written_out else nullcontext()
            with self.matmuls(), attending, torch.enable_grad():
                loss = self.task.objective(self.model, part) * share
            total += loss.item()
            loss.backward()
        return self.refuse(sum(processes.gather(total)) / processes.count, "the loss")

    def matmuls(self) -> AbstractContextManager[Any]:
        """Return the context that sets the precision of products."""
        fast = self.plan.fast_matmuls
        return (machine.fast_matmuls if fast else machine.exact_matmuls)(self.device)

    # -- monitoring ------------------------------------------------------------------------------

    def refuse(self, value: float, what: str) -> float:
        """Return a number if it is finite.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        if not math.isfinite(value):
            self.fail(f"{what} is {value}", {"step": self.outcome.step + 1, "loss": None})
        return value

    def fail(self, what: str, line: dict[str, Any] | None) -> None:
        """End a failed training, with the best weights if there are any."""
        if line is not None:
            self.saved.log.add(line)
        if self.outcome.best_step is not None:
            self.saved.restore_best(self.parameters)
        kept = "" if self.saved.folder is None else f", log and last save in {self.saved.folder}"
        raise NumericalError(
            what,
            where=f"step {self.outcome.step} of training, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.2g}{kept}",
            remedy="train with a third of the learning rate, or with a longer warm-up; "
            "--resume with a lower --learning-rate continues from the last save",
        )

    def validation_loss(self) -> float | None:
        """The next-token loss of the validation windows; None without them."""
        windows = self.task.validation
        if windows is None:
            return None
        size = self.plan.at_once(windows.windows.shape[1])
        return mean_loss(self.model, self.next_token, windows, size, self.device, self.matmuls)

    def validate(self) -> None:
        """Measure the loss of the validation windows, if there are any; keep the best weights."""
        begun, outcome = time.perf_counter(), self.outcome
        mean = self.validation_loss()
        if mean is None:
            return
        self.processes.reshard(self.model)
        loss = self.refuse(self.processes.once(lambda: mean), "the validation loss")
        outcome.validations.append((outcome.step, loss))
        # Losses at another sparsity cannot be compared: when masks change, the best begins anew.
        kept = self.masks.count if self.hooks else -1
        if loss < outcome.best_loss or kept != outcome.best_kept:
            outcome.best_loss, outcome.best_step, outcome.best_kept = loss, outcome.step, kept
            self.saved.keep_best(self.parameters)
        self.last_validation_seconds = time.perf_counter() - begun

    def validations_due(self) -> int:
        """The number of validations due so far."""
        if self.task.validation is None:
            return 0
        return int(self.done()[0] * self.plan.validations + 1e-9)

    def save_if_due(self) -> None:
        """Save the state for a resumed training, if a save is due.

        A suspiciously high loss delays the save, because the earlier state must survive a
        divergence.
        """
        if self.watch.is_suspicious(self.outcome.log):
            return
        waited = time.perf_counter() - self.saved_at >= 60 * self.plan.save_minutes
        if self.saved.folder is not None and self.processes.once(lambda: waited):
            self.save()

    def save(self) -> None:
        """Save the state for a resumed training."""
        self.masks.check(self.model, self.optimizer)
        self.outcome.seconds = self.clock()
        self.saved.save_state(self.parameters, self.optimizer, self.hooks, self.outcome.facts())
        self.saved_at = time.perf_counter()

    def report(self, loss: float) -> None:
        """Move the progress bar."""
        outcome = self.outcome
        if self.plan.minutes:
            place = min(TICKS, int(TICKS * self.clock() / (60 * self.plan.minutes)))
        else:
            place = outcome.step - self.plan.first_step
        note = f"loss {loss:.3f}" if loss else ""  # 0 before the first step
        if outcome.validations:
            # exp(710) is beyond float64
            note += f", validation {math.exp(min(outcome.validations[-1][1], 700)):.2f}"
        if self.last_step_seconds:
            rate = self.tokens_of_step / self.last_step_seconds
            note += f", {rate:.0f} tokens/s"
        self.progress.step(place - self.reported, note)
        self.reported = place


@dataclass
class Outcome:
    """The outcome of a training, or its progress while it runs.

    Attributes:
        step: number of steps of the optimizer.
        tokens: number of tokens that all processes read.
        seconds: duration of all runs together, with validation and saving.
        validations: (step, mean loss in nats per token) before the first step and during the run.
        best_step: the step with the lowest validation loss; None without validation. The model ends
            with its weights.
        best_loss: validation loss at the best step.
        best_kept: number of weights that the masks kept at the best step, if hooks may change
            masks; else −1.
        learning_rate: the highest learning rate of a step.
        stopped: the reason for the end: `steps` or `minutes`.
        log: one line for every step: step, loss, learning_rate, gradient_norm.
        folder: where the final weights and the log are; None if nothing is saved.
        rounds: what each training in rounds did (`gradual.Rounds`).
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float = math.inf
    best_kept: int = -1
    learning_rate: float = 0.0
    stopped: str = ""
    log: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What a resumed training must know, as JSON values; the log has a file of its own."""
        facts = {k: v for k, v in vars(self).items() if k not in ("log", "folder", "rounds")}
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {**facts, "best_loss": best}

    def take(self, facts: dict[str, Any]) -> None:
        """Continue from saved facts."""
        for key in self.facts().keys() & facts.keys():
            setattr(self, key, facts[key])
        self.validations = [(int(step), loss) for step, loss in self.validations]
        self.best_loss = math.inf if self.best_loss is None else self.best_loss


WATCHED = 10
"""Number of steps in one median."""
SUSPECT, NOISE = 1.5, 0.1


class _DivergenceWatch:
    """Finds a training that diverges.

    Let m be the median of the last 10 losses. A training diverges when

        m_now > limit · min(m so far) + 0.1 · loss_1

    The last term lets a loss near 0 vary.

    Args:
        limit: factor of the lowest median; 0 sets no limit.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.lowest = self.latest = math.inf
        self.watched = 0

    def fault(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """Read the new lines of the log. Return a description of the divergence, or None.

        Args:
            log: one line for each step, with `loss`.
        """
        # A resumed training reads its whole log again, so it knows the lowest median of all runs.
        for end in range(max(WATCHED, self.watched + 1), len(log) + 1):
            self.latest = statistics.median(line["loss"] for line in log[end - WATCHED : end])
            self.lowest, self.watched = min(self.lowest, self.latest), end
        if not self.watched or not self.limit:
            return None
        if self.latest <= self.limit * self.lowest + NOISE * log[0]["loss"]:
            return None
        return (
            f"the loss has risen from {self.lowest:.3g} to {self.latest:.3g} (medians of {WATCHED} "
            "steps): training diverges"
        )

    def is_suspicious(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last loss is so high that the training may diverge soon."""
        if not self.watched or not self.limit:
            return False
        allowed: float = SUSPECT * self.lowest + NOISE * log[0]["loss"]
        return bool(log[-1]["loss"] > allowed)


@torch.no_grad()
def mean_loss(
    model: Any,
    objective: Objective,
    read: Batches,
    at_once: int,
    device: torch.device,
    matmuls: Callable[[], AbstractContextManager[Any]],
) -> float:
    """The mean loss over windows, or over the tokens of their answers.

    Args:
        model: a causal language model.
        objective: the loss of a batch; a mean over its windows.
        read: the windows, on any device.
        at_once: number of windows in one forward.
        device: where the model computes.
        matmuls: returns a context that sets the precision of products.
    """
    total = 0.0
    for batch in read.parts(range(len(read.windows)), at_once, device):
        # the cache of weights in bfloat16 lasts as long as the context: one micro-batch
        with matmuls():
            total += objective(model, batch).item() * len(batch.ids)
    return total / len(read.windows)
