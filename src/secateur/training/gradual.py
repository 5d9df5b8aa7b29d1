"""Pruning while a model trains: a little every few steps (gradual), or in rounds (iterative).

Gradual pruning is a hook of the training loop that changes the masks which the loop holds.
Iterative pruning trains after each round:

    round r of n:   mask = pattern(score of the kept weights, schedule(r / n))
                    rewind: nothing, the learning rate, or the weights too
                    train with the mask held

Any score and pattern select the weights to keep (`Criterion`). The engine gathers the statistics of
scores with one decoder layer in memory. A model in training is in memory anyway, so this module
uses ordinary forwards and backwards with the current weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import Gathering, watched
from secateur.errors import NumericalError, RecipeError
from secateur.machine import full_float32
from secateur.models.architecture import Linear
from secateur.recipes.train import GradualOptions, IterativeOptions
from secateur.runs.output import write_json
from secateur.sparsity.allocation.global_threshold import global_threshold
from secateur.sparsity.patterns import Pattern, n_of_m, parse_pattern, unstructured
from secateur.sparsity.schedules import Schedule, levels, schedules
from secateur.sparsity.scores import ScoreFunction, scores
from secateur.training.batches import Batches
from secateur.training.loop import Loop, Outcome, TrainingTask
from secateur.training.masks import Masks, moments, prunable, stored_masks
from secateur.training.saved import open_tensors, write_whole
from secateur.training.training_plan import TrainingPlan
from secateur.types import STORED, Mask, Score, Statistics, Windows


@dataclass(frozen=True)
class Criterion:
    """The rule that chooses weights: a score and a pattern.

    Pruned weights stay pruned, unless weights are exchanged: the pattern may keep only the weights
    of the current masks (`Pattern.mask`). With scope `global`, one threshold over the model sets
    the sparsity of each linear. Otherwise all linears have the same sparsity.

    Args:
        score: importance of each weight.
        pattern: which zeros are allowed. N:M is reached in stages of decreasing N.
        windows: token ids [samples, sequence_length] for scores that need statistics.
    """

    score: ScoreFunction = field(default_factory=lambda: scores["magnitude"]())
    pattern: Pattern = field(default_factory=unstructured.Unstructured)
    windows: Windows | None = None

    def masks(
        self, model: Any, kept: Mapping[str, Tensor], sparsity: float, exchanged: float = 0.0
    ) -> dict[str, Tensor]:
        """Return the masks at a sparsity, True = kept, by parameter, in its stored orientation.

        Args:
            model: the model with its current weights, in eval mode.
            kept: the current masks.
            sparsity: sparsity of every linear; with scope `global`, of all linears together.
            exchanged: fraction of the kept weights to exchange for pruned weights with the
                largest gradients; see `exchange`.

        Raises:
            RecipeError: weights are exchanged under N:M, or there are no windows for a score.
            PatternError: the pattern cannot have this sparsity.
        """
        pattern = stage(self.pattern, sparsity)
        if pattern is None:
            return dict(kept)
        if exchanged and isinstance(pattern, n_of_m.NOfM):
            raise RecipeError(
                f"weights cannot be exchanged under the pattern {pattern.name}",
                remedy="regrow weights with unstructured sparsity or blocks",
            )
        linears = {f"{x.name}.weight": x for x in prunable(model) if f"{x.name}.weight" in kept}
        requires = self.score.requires | ({"gradient"} if exchanged else set())
        gathered = gather(model, list(linears.values()), requires, self.windows)
        # scores and patterns see [out, in]; GPT-2 stores [in, out]
        rows = {n: kept[n].t() if x.transposed else kept[n] for n, x in linears.items()}
        scores = {n: self.score(x.weight, gathered[x.name]) for n, x in linears.items()}
        shares = _shares(pattern, scores, rows, sparsity)
        masks = {}
        for name, linear in linears.items():
            if exchanged:
                gradient = gathered[linear.name]["gradient"]
                mask = exchange(
                    scores[name], rows[name], gradient, pattern, shares[name], exchanged
                )
            else:
                mask = pattern.mask(scores[name], shares[name], allowed=rows[name])
            masks[name] = mask.t().contiguous() if linear.transposed else mask
        return masks


def exchange(
    score: Score, kept: Mask, gradient: Score, pattern: Pattern, sparsity: float, fraction: float
) -> Mask:
    """Return a mask of this sparsity, with some weights exchanged for weights of large gradient.

    The score first selects the weights to keep. The lowest `fraction` of them is dropped. The same
    number is then chosen by |∂L/∂w| among all other weights, including the dropped ones.

    Paper: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134;
    after a step of gradual pruning as in GraNet, Liu et al. 2021, arXiv:2106.10404.

    Args:
        score: float32 [out, in].
        kept: the current mask, bool [out, in].
        gradient: gradient of the loss, also of pruned weights; float32 [out, in].
        pattern: which zeros are allowed.
        sparsity: sparsity of the result.
        fraction: fraction of the kept weights, at least 0 and below 1.
    """
    # the sparsity after `fraction` of the kept share 1 − sparsity is dropped too
    survivors = pattern.mask(score, sparsity + fraction * (1 - sparsity), allowed=kept)
    rows, columns = score.shape
    missing = rows * columns - pattern.pruned((rows, columns), sparsity) - int(survivors.sum())
    if missing <= 0:
        return survivors
    # The restored weights form a separate mask over all weights that do not survive.
    return survivors | pattern.mask(gradient.abs(), 1 - missing / score.numel(), allowed=~survivors)


def stage(pattern: Pattern, sparsity: float) -> Pattern | None:
    """Return the intermediate pattern for a sparsity below the pattern's own.

    For N:M this is N':M with the nearest N' >= N, or None if N' = M. Other patterns allow any
    sparsity and return themselves.
    """
    if not isinstance(pattern, n_of_m.NOfM):
        return pattern
    # the nearest N', halves upwards: a stage is never sparser than the schedule by half a weight
    kept = max(pattern.kept, math.floor((1 - sparsity) * pattern.group + 0.5))
    return None if kept >= pattern.group else n_of_m.NOfM(kept, pattern.group)


def _shares(
    pattern: Pattern, scores: Mapping[str, Score], kept: Mapping[str, Mask], sparsity: float
) -> dict[str, float]:
    """Return the sparsity of each linear: the pattern's, a uniform one, or by one threshold."""
    if pattern.scope != "global" or pattern.sparsity is not None:
        return dict.fromkeys(scores, sparsity if pattern.sparsity is None else pattern.sparsity)
    units = {n: pattern.units(s.masked_fill(~kept[n], 0.0)) for n, s in scores.items()}
    # units that are pruned already: at least these stay pruned, so they bound each linear below
    gone = {n: int((pattern.units(k.float()) == 0).sum()) for n, k in kept.items()}
    sizes = {n: u.numel() for n, u in units.items()}
    counts = global_threshold(
        units.items,
        max(round(sparsity * sum(sizes.values())), sum(gone.values())),
        {n: (gone[n], sizes[n]) for n in sizes},
    )
    return {n: counts[n] / sizes[n] for n in sizes}


@full_float32()
def gather(
    model: Any, linears: Sequence[Linear], requires: frozenset[str], windows: Windows | None
) -> dict[str, Statistics]:
    """Return the statistics of linears by full name. Each forward runs one window.

    Memory: the statistics of all linears. Gradients also need two float32 copies of their
    weights and the activations of one window.

    Args:
        model: a causal language model in eval mode. The call leaves no gradient on it.
        linears: the matrices to score.
        requires: names of statistics; see `secateur.types.Statistics`.
        windows: token ids [samples, sequence_length]; None where no statistic needs a forward.

    Raises:
        RecipeError: a statistic needs windows, and there are none.
        NumericalError: the loss of a window, or an input of a linear, is not finite.
    """
    gathered: dict[str, dict[str, Tensor]] = {
        x.name: {STORED: x.weight} if STORED in requires else {} for x in linears
    }
    run = requires - {STORED}
    if not run:
        return dict(gathered)
    if windows is None:
        raise RecipeError(
            f"the score needs {', '.join(sorted(run))}, but there are no windows to gather it from",
            remedy="give windows of token ids [samples, sequence_length], or use score 'magnitude'",
        )
    device = linears[0].weight.device
    backward = Gathering.of(run).backward
    with watched(linears, run) as running:
        for number, ids in enumerate(windows):
            with torch.set_grad_enabled(bool(backward)):
                logits = model(input_ids=ids[None].to(device), use_cache=False).logits
                if not backward:
                    continue
                loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids.to(device)[1:])
                if not torch.isfinite(loss):
                    raise NumericalError(
                        f"the loss of window {number} is {loss.item()}",
                        remedy="lower the learning rate, or use float32 or bfloat16",
                    )
                # The statistics watch the gradients. `grad` sums none on the parameters, where the
                # next step of the training would add to it.
                torch.autograd.grad(loss, [x.module.get_parameter("weight") for x in linears])
    for name, values in gathered.items():
        values |= {key: statistic.value() for key, statistic in running[name].items()}
    return dict(gathered)


def check_parts(how: GradualOptions | IterativeOptions) -> None:
    """Refuse parts that do not exist, before a model is read.

    Raises:
        RecipeError: names the part.
    """
    if isinstance(how, GradualOptions):
        schedules[how.schedule]
    scores[how.score]
    parse_pattern(how.pattern, how.scope)


def pruning_of(
    how: GradualOptions | IterativeOptions, sparsity: float, windows: Windows
) -> tuple[Schedule, Criterion]:
    """Return the schedule from a sparsity on, and the rule that chooses weights.

    Args:
        how: of the recipe.
        sparsity: of the model with which the training begins.
        windows: the training windows, of which the scores see some.

    Raises:
        RecipeError: there is no sparsity to end at, or it contradicts the pattern or the model.
    """
    kind = "iterative" if isinstance(how, IterativeOptions) else "gradual"
    pattern = parse_pattern(how.pattern, how.scope)
    last = how.sparsity if pattern.sparsity is None else pattern.sparsity
    if last is None:
        raise RecipeError(
            f"{kind} pruning needs a sparsity to end at",
            remedy=f"--{kind} 0.8, or --{kind} 2:4",
        )
    if how.sparsity not in (None, last):
        raise RecipeError(
            f"the pattern {how.pattern} has the sparsity {last:g}, not {how.sparsity:g}",
            remedy="leave the sparsity out",
        )
    if sparsity > last:
        raise RecipeError(
            f"{sparsity:.1%} of the weights are zero already, more than {last:.1%}, the "
            "sparsity at the end",
            remedy="give a higher sparsity, or begin with a denser model",
        )
    # rounds prune the same fraction of the remaining weights each time
    name = "geometric" if isinstance(how, IterativeOptions) else how.schedule
    schedule: Any = schedules[name]
    return schedule(last, sparsity), Criterion(scores[how.score](), pattern, windows[: how.windows])


@torch.no_grad()
def renew(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Change masks in place, and set the newly pruned weights and their moments to 0.

    Restored weights begin at 0 with moments of 0, because the old mask held them there.

    Args:
        model: the model that owns the parameters.
        kept: the held masks; the function overwrites them.
        masks: the new masks.
        optimizer: the optimizer whose moments become 0; None if there is none yet.
    """
    for name, mask in masks.items():
        kept[name].copy_(mask)
        parameter = model.get_parameter(name)
        gone = ~kept[name]
        for held in (parameter, *moments(optimizer, parameter)):
            held.masked_fill_(gone, 0.0)


@dataclass(frozen=True)
class GradualPruning:
    """A hook that renews the masks every `every` steps, from the share `begin` to the share `end`
    of all steps (`GradualOptions`):

        sparsity = schedule((step − first) / (last − first))        cubic is usual

    The last renewal is exactly at `end`, whatever `every` is. In the remaining steps the masks do
    not change, and the kept weights recover.

    Paper: Zhu and Gupta 2017, arXiv:1710.01878 (schedule, and masks every n steps). With
    `regrowth`, after each renewal a fraction of the kept weights is exchanged for pruned ones of
    large gradient, as in GraNet, Liu et al. 2021, arXiv:2106.10404. The fraction falls along a half
    cosine, as in RigL, Evci et al. 2020, arXiv:1911.11134. Restored weights begin at 0, as in these
    papers. Deviations: the gradients come from the criterion's windows, not from the current batch;
    the last renewal restores no weight, because such a weight would have no steps to grow.

    Args:
        kept: the masks that the loop holds, True = kept, by parameter, in its stored
            orientation. The hook changes them in place. `open_masks` makes them.
        schedule: the sparsity from the first renewal to the last.
        criterion: chooses the weights.
        options: when masks are renewed, and how many weights are exchanged.
    """

    kept: Mapping[str, Tensor]
    schedule: Schedule
    criterion: Criterion = field(default_factory=Criterion)
    options: GradualOptions = field(default_factory=lambda: GradualOptions())

    def due(self, step: int, steps: int) -> float | None:
        """Return the finished share of the pruning at a step; None if no renewal is due."""
        last = max(round(self.options.end * steps), 1)
        first = min(round(self.options.begin * steps), last - 1)
        # the last renewal happens whatever `every` is, so the sparsity ends exact
        if not first < step <= last or (step != last and (step - first) % self.options.every):
            return None
        return (step - first) / (last - first)

    def exchanged(self, done: float) -> float:
        """Return the fraction of the kept weights to exchange when this share is done."""
        return 0.5 * self.options.regrowth * (1 + math.cos(math.pi * done))

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`.

        Raises:
            PatternError: the pattern cannot have the next sparsity.
            NumericalError: a score, or the loss behind the gradients, is not a number.
        """
        done = self.due(step, steps)
        if done is not None:
            exchanged = self.exchanged(done)
            masks = self.criterion.masks(model, self.kept, self.schedule(done), exchanged)
            renew(model, self.kept, masks, optimizer)

    def state(self) -> Mapping[str, Tensor]:
        """The masks."""
        return self.kept


# -- rounds ---------------------------------------------------------------------------------------


MakeLoop = Callable[..., Loop]
"""`Loop`, or what takes its place: (task, plan, saved=, label=) → a loop."""

REPORT, EARLY = "report.json", "early.safetensors"
MASKS, FINAL = "masks.safetensors", "final.safetensors"


@dataclass(frozen=True)
class Rounds:
    """Iterative pruning. `rewind` selects what is reset before each training:

    - `none`: nothing. One schedule of the learning rate covers all rounds. Han et al. 2015,
      arXiv:1506.02626, with our schedule of the learning rate in place of a constant low one;
    - `rate`: the learning rate starts again at `rewind_step`; the weights stay. Renda et al. 2020,
      "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv:2003.02389;
    - `weights`: the weights go back to their values at `rewind_step` of a training of the dense
      model too. This finds lottery tickets. Step 0: Frankle and Carbin 2019, arXiv:1803.03635. An
      early step: Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
      arXiv:1912.05671.

    Deviations: any score and any pattern can choose the weights. With `rate`, a round reads on from
    where the last one stopped: weights that stay would learn the same windows by heart. With
    `weights`, all rounds read the same windows in the same order.

    Each training has a folder, `dense` or `round-N`, with its masks, its final weights, and a
    report when it is finished. A killed run resumes in the unfinished one. As a hook of the dense
    training, this object writes the early weights.

    Args:
        kept: the masks that each loop holds, True = kept, by parameter; changed in place.
        schedule: the sparsity after each round.
        criterion: chooses the weights.
        how: rounds and rewinding.
        folder: of the trainings.
        task: what each training learns, with weights in float32.
    """

    kept: Mapping[str, Tensor]
    schedule: Schedule
    criterion: Criterion
    how: IterativeOptions
    folder: Path
    task: TrainingTask

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Write the weights of the step to which the rounds go back."""
        if step == self.how.rewind_step:
            write_whole(self.folder / EARLY, dict(model.named_parameters()))

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: the file is the state."""
        return {}

    def part(self, number: int, plan: TrainingPlan) -> TrainingPlan:
        """The plan of a round, counted from 1.

        Raises:
            RecipeError: the plan has no number of steps, or `rewind_step` is after its end.
        """
        if plan.minutes or self.how.rewind_step >= plan.steps:
            raise RecipeError(
                f"a training has {plan.steps or 'no number of'} steps, and rewind_step is "
                f"{self.how.rewind_step}",
                remedy="give --steps of each round, and go back to an earlier step",
            )
        if self.how.rewind != "none":
            return plan.model_copy(update={"first_step": self.how.rewind_step})
        # one schedule over all rounds, of which this is the part of one round
        whole = {"steps": self.how.rounds * plan.steps, "last_step": number * plan.steps}
        return plan.model_copy(update={**whole, "first_step": (number - 1) * plan.steps})

    def batches(self, finished: int, plan: TrainingPlan) -> Batches:
        """The windows of each step of a round, after some finished ones."""
        read = finished * (plan.steps - self.how.rewind_step) if self.how.rewind == "rate" else 0
        batches = self.task.batches
        return replace(batches, chosen=lambda step: batches.numbers(read + step))

    def train(self, make_loop: MakeLoop, plan: TrainingPlan) -> Outcome:
        """Prune and train in rounds. A call after a kill resumes.

        Returns:
            The outcome of all trainings together, with the record of each.

        Raises:
            VerificationError: a training did not hold the masks.
        """
        numbers, folder, model = range(1, self.how.rounds + 1), self.folder, self.task.model
        trainings: list[tuple[str, TrainingPlan, float | None]] = [
            (f"round-{n}", self.part(n, plan), sparsity)
            for n, sparsity in zip(numbers, levels(self.schedule, self.how.rounds), strict=True)
        ]
        last = None
        folder.mkdir(parents=True, exist_ok=True)
        if self.how.rewind == "weights":
            trainings.insert(0, ("dense", plan, None))
            # step 0 is before the first step, so no hook sees it
            if not self.how.rewind_step and not (folder / EARLY).exists():
                self.on_step(0, 0, model, None)
        whole = Outcome(folder=folder / trainings[-1][0])
        before = make_loop(self.task, plan).validation_loss()
        if before is not None:
            whole.validations.append((0, before))
        for name, part, sparsity in trainings:
            place = folder / name
            if not (place / REPORT).exists():
                self._begin(place, last, sparsity)
                dense = sparsity is None and self.how.rewind_step
                hooks = (self,) if dense else self.task.hooks
                batches = self.batches(len(whole.rounds), plan)
                task = replace(self.task, batches=batches, hooks=hooks)
                outcome = make_loop(task, part, saved=place, label=f"training {name}").run()
                masks = Masks(self.kept)
                masks.check(model)
                share = masks.sparsity if sparsity is None else sparsity
                write_json(place / REPORT, {"sparsity": share, "facts": outcome.facts()})
                # The report is written: now only its final weights and masks are still needed.
                for file in folder.glob("*/*.safetensors"):
                    if file.parent != place or file.name not in (MASKS, FINAL):
                        file.unlink()
            report = json.loads((place / REPORT).read_text(encoding="utf-8"))
            whole.rounds.append(_added(whole, name, report, part.first_step))
            last = place
        return whole

    def _begin(self, place: Path, last: Path | None, sparsity: float | None) -> None:
        """Set the weights and the masks with which a training begins."""
        place.mkdir(exist_ok=True)
        # A resumed run has not trained the rounds before this one, so all comes from files.
        if last is not None:
            self._put(last / FINAL)
            if (last / MASKS).exists():
                renew(self.task.model, self.kept, dict(stored_masks(last / MASKS)))
        if sparsity is None:
            return
        # scored on the trained weights, then the weights go back to the early ones
        if not (place / MASKS).exists():
            write_whole(place / MASKS, self.criterion.masks(self.task.model, self.kept, sparsity))
        if self.how.rewind == "weights":
            self._put(place.parent / EARLY)
        renew(self.task.model, self.kept, dict(stored_masks(place / MASKS)))

    @torch.no_grad()
    def _put(self, file: Path) -> None:
        """Overwrite the parameters of the model with the values in a file."""
        with open_tensors(file) as stored:
            for name in stored:
                self.task.model.get_parameter(name).copy_(stored[name])


def _added(whole: Outcome, name: str, report: Mapping[str, Any], first_step: int) -> dict[str, Any]:
    """Add a finished training to the outcome of all. Return its record."""
    outcome = Outcome()
    outcome.take(report["facts"])
    losses, steps = [loss for _, loss in outcome.validations], outcome.step - first_step
    whole.validations += [(whole.step + s - first_step, x) for s, x in outcome.validations]
    if outcome.best_step is not None:
        whole.best_step = whole.step + outcome.best_step - first_step
    whole.best_loss, whole.stopped = outcome.best_loss, outcome.stopped
    whole.learning_rate = max(whole.learning_rate, outcome.learning_rate)
    whole.step += steps
    whole.tokens += outcome.tokens
    whole.seconds += outcome.seconds
    return {
        "training": name,
        "sparsity": report["sparsity"],
        "steps": steps,
        "tokens": outcome.tokens,
        "perplexity_before": math.exp(losses[0]) if losses else None,
        "perplexity_after": math.exp(outcome.best_loss) if losses else None,
    }
