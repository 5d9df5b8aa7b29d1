"""Pruning while a model trains: a little every few steps (gradual), or in rounds (iterative).

Gradual pruning is a hook of the training loop that changes the masks which the loop holds. Regrowth
restores weights. Iterative pruning retrains after each round:

    round r of n:   mask = pattern(score of the kept weights, schedule(r / n))
                    rewind
                    retrain with the mask held

`rewind` selects what is reset before each retraining: nothing, the learning rate, or the weights.
Any score and pattern select the weights to keep (`Criterion`). The engine gathers the statistics of
scores with one decoder layer in memory. A model in training is in memory anyway, so this module
uses ordinary forwards and backwards with the current weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import Gathering, watched
from secateur.errors import CheckpointError, NumericalError, RecipeError
from secateur.models.architecture import Linear, describe, linears_of
from secateur.precision import full_float32
from secateur.recipes.train import GradualOptions
from secateur.registry import did_you_mean
from secateur.sparsity.allocation.global_threshold import global_threshold
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.patterns.n_of_m import NOfM
from secateur.sparsity.patterns.unstructured import Unstructured
from secateur.sparsity.schedules import Schedule, levels
from secateur.sparsity.scores import ScoreFunction
from secateur.sparsity.scores.magnitude import Magnitude
from secateur.training.masks import Masks, moments, stored_masks
from secateur.training.saved import write_whole
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

    score: ScoreFunction = field(default_factory=Magnitude)
    pattern: Pattern = field(default_factory=Unstructured)
    windows: Windows | None = None

    def masks(
        self, model: Any, kept: Mapping[str, Tensor], sparsity: float, exchanged: float = 0.0
    ) -> dict[str, Tensor]:
        """Return the masks at a sparsity, True = kept, by parameter, in its stored orientation.

        Args:
            model: the model with its current weights.
            kept: the current masks.
            sparsity: sparsity of every linear; with scope `global`, of all linears together.
            exchanged: fraction of the kept weights to exchange for pruned weights with the
                largest gradients; see `exchange`.

        Raises:
            RecipeError: the pattern is N:M, which does not allow exchanges.
            PatternError: the pattern cannot have this sparsity.
        """
        pattern = stage(self.pattern, sparsity)
        if pattern is None:
            return dict(kept)
        if exchanged and isinstance(pattern, NOfM):
            raise RecipeError(
                f"weights cannot be exchanged under the pattern {pattern.name}",
                remedy="regrow weights with unstructured sparsity or blocks",
            )
        linears = {f"{x.name}.weight": x for x in prunable(model) if f"{x.name}.weight" in kept}
        requires = self.score.requires | ({"gradient"} if exchanged else set())
        gathered = gather(model, list(linears.values()), requires, self.windows)
        rows = {n: kept[n].t() if x.transposed else kept[n] for n, x in linears.items()}
        scores = {n: self.score(x.weight, gathered[x.name]) for n, x in linears.items()}
        shares = _shares(pattern, scores, rows, sparsity)
        masks = {}
        for name, linear in linears.items():
            score, alive = scores[name], rows[name]
            if exchanged:
                gradient = gathered[linear.name]["gradient"]
                mask = exchange(score, alive, gradient, pattern, shares[name], exchanged)
            else:
                mask = pattern.mask(score, shares[name], allowed=alive)
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
    survivors = pattern.mask(score, sparsity + fraction * (1 - sparsity), allowed=kept)
    rows, columns = score.shape
    missing = rows * columns - pattern.pruned((rows, columns), sparsity) - int(survivors.sum())
    if missing <= 0:
        return survivors
    # The restored weights form a separate mask over all weights that do not survive.
    share = (rows * columns - missing) / (rows * columns)
    return survivors | pattern.mask(gradient.abs(), share, allowed=~survivors)


def stage(pattern: Pattern, sparsity: float) -> Pattern | None:
    """Return the intermediate pattern for a sparsity below the pattern's own.

    For N:M this is N':M with the nearest N' >= N, or None if N' = M. Other patterns allow any
    sparsity and return themselves.
    """
    if not isinstance(pattern, NOfM):
        return pattern
    kept = max(pattern.kept, math.floor((1 - sparsity) * pattern.group + 0.5))
    return None if kept >= pattern.group else NOfM(kept, pattern.group)


def prunable(model: Any) -> list[Linear]:
    """All matrices of the decoder layers, in order."""
    architecture = describe(model)
    return [
        linear
        for index, layer in enumerate(architecture.layers(model))
        for linear in linears_of(layer, architecture.layer_name(index)).values()
    ]


def _shares(
    pattern: Pattern, scores: Mapping[str, Score], kept: Mapping[str, Mask], sparsity: float
) -> dict[str, float]:
    """Return the sparsity of each linear: the pattern's, a uniform one, or by one threshold."""
    if pattern.sparsity is not None:
        return dict.fromkeys(scores, pattern.sparsity)
    if pattern.scope != "global":
        return dict.fromkeys(scores, sparsity)
    units = {n: pattern.units(s.masked_fill(~kept[n], 0.0)) for n, s in scores.items()}
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
        model: a causal language model. It is in eval mode during the call, and the call leaves no
            gradient on it.
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
    if windows is None or not len(windows):
        raise RecipeError(
            f"the score needs {', '.join(sorted(run))}, but there are no windows to gather it from",
            remedy="give windows of token ids [samples, sequence_length], or use score 'magnitude'",
        )
    device = linears[0].weight.device
    backward = Gathering.of(run).backward
    with _eval(model), watched(linears, run) as running:
        for number, ids in enumerate(windows):
            with torch.set_grad_enabled(bool(backward)):
                logits = model(input_ids=ids[None].to(device), use_cache=False).logits
                if not backward:
                    continue
                loss = cross_entropy(logits[0, :-1].float(), ids.to(device)[1:])
                if not torch.isfinite(loss):
                    raise NumericalError(
                        f"the loss of window {number} is {loss.item()}",
                        remedy="lower the learning rate, or use float32 or bfloat16",
                    )
                torch.autograd.grad(loss, [x.module.get_parameter("weight") for x in linears])
    for name, values in gathered.items():
        values |= {key: statistic.value() for key, statistic in running[name].items()}
    return dict(gathered)


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Gradual:
    """New masks every `every` steps, from the share `begin` to the share `end` of all steps
    (`GradualOptions`):

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
        schedule: the sparsity from the first renewal to the last.
        criterion: chooses the weights.
        options: when masks are renewed, and how many weights are exchanged.

    Raises:
        RecipeError: the end is before the beginning, or there are no windows to take gradients
            from.
    """

    schedule: Schedule
    criterion: Criterion = field(default_factory=Criterion)
    options: GradualOptions = field(default_factory=lambda: GradualOptions())

    def __post_init__(self) -> None:
        begin, end = self.options.begin, self.options.end
        if begin > end:
            raise RecipeError(
                f"gradual pruning from {begin} to {end} of the steps",
                remedy="give shares with 0 <= begin <= end <= 1, for example 0 and 0.75",
            )
        if self.options.regrowth and self.criterion.windows is None:
            raise RecipeError(
                "regrowth takes gradients, but the criterion has no windows",
                remedy="give the criterion windows of token ids",
            )

    def due(self, step: int, steps: int) -> float | None:
        """Return the finished share of the pruning at a step; None if no renewal is due."""
        last = max(round(self.options.end * steps), 1)
        first = min(round(self.options.begin * steps), last - 1)
        if not first < step <= last or (step != last and (step - first) % self.options.every):
            return None
        return (step - first) / (last - first)

    def exchanged(self, done: float) -> float:
        """Return the fraction of the kept weights to exchange when this share is done."""
        return 0.5 * self.options.regrowth * (1 + math.cos(math.pi * done))


class GradualPruning:
    """The hook that renews the masks when a renewal is due.

    Args:
        kept: the masks that the loop holds, True = kept, by parameter, in its stored
            orientation. The hook changes them in place. `open_masks` makes them.
        how: the settings.
    """

    def __init__(self, kept: Mapping[str, Tensor], how: Gradual) -> None:
        self.kept, self.how = kept, how

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`.

        Raises:
            PatternError: the pattern cannot have the next sparsity.
            NumericalError: a score, or the loss behind the gradients, is not a number.
        """
        done = self.how.due(step, steps)
        if done is None:
            return
        sparsity, exchanged = self.how.schedule(done), self.how.exchanged(done)
        masks = self.how.criterion.masks(model, self.kept, sparsity, exchanged)
        renew(model, self.kept, masks, optimizer)

    def state(self) -> Mapping[str, Tensor]:
        """The masks."""
        return self.kept


def open_masks(model: Any) -> dict[str, Tensor]:
    """Masks of all matrices of the decoder layers: True wherever the weight is not zero."""
    linears = {f"{x.name}.weight": x for x in prunable(model)}
    return {name: x.module.get_parameter("weight").detach() != 0 for name, x in linears.items()}


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
        parameter.masked_fill_(gone, 0.0)
        for moment in moments(optimizer, parameter):
            moment.masked_fill_(gone, 0.0)


REWINDS = ("none", "rate", "weights")


@dataclass(frozen=True)
class PruningRounds:
    """The settings of iterative pruning.

    `rewind` selects what is reset before each retraining:

    - `none`: nothing. One schedule of the learning rate covers all rounds. Han et al. 2015,
      arXiv:1506.02626, with our schedule of the learning rate in place of a constant low one;
    - `rate`: the learning rate starts again at `rewind_step`; the weights stay. Renda et al. 2020,
      "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv:2003.02389;
    - `weights`: the weights go back to their values at `rewind_step` too. This finds lottery
      tickets. Step 0: Frankle and Carbin 2019, arXiv:1803.03635. An early step: Frankle et al.
      2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv:1912.05671.

    Deviation from all of them: any score and any pattern can choose the weights.

    Args:
        schedule: the sparsity after each round. `geometric` prunes the same fraction of the
            remaining weights in each round.
        rounds: number of rounds; 1 is one-shot pruning.
        criterion: chooses the weights.
        rewind: `none`, `rate` or `weights`.
        rewind_step: the step of a training to return to.

    Raises:
        RecipeError: a number is out of range, or `rewind` has another value.
    """

    schedule: Schedule
    rounds: int
    criterion: Criterion = field(default_factory=Criterion)
    rewind: str = "rate"
    rewind_step: int = 0

    def __post_init__(self) -> None:
        levels(self.schedule, self.rounds)
        if self.rewind not in REWINDS:
            raise RecipeError(
                f"unknown rewinding {self.rewind!r}",
                remedy=did_you_mean(self.rewind, list(REWINDS)),
            )
        if self.rewind_step < 0:
            raise RecipeError(f"rewind_step is {self.rewind_step}", remedy="give 0 or more")
        if self.rewind_step and self.rewind == "none":
            raise RecipeError(
                f"rewind_step is {self.rewind_step}, but nothing goes back",
                remedy="leave it out, or set rewind to rate or weights",
            )

    def span(self, number: int, steps: int) -> tuple[int, int, int]:
        """Return the first and last step of a round, and the length of the schedule.

        Args:
            number: number of the round, 1 to `rounds`.
            steps: number of steps in one training.

        Raises:
            RecipeError: `rewind_step` is after the end of the training.
        """
        if self.rewind == "none":
            return (number - 1) * steps, number * steps, self.rounds * steps
        if self.rewind_step >= steps:
            raise RecipeError(
                f"rewind_step is {self.rewind_step}, but one training has {steps} steps",
                remedy="go back to an earlier step",
            )
        return self.rewind_step, steps, steps


@dataclass(frozen=True)
class Round:
    """The facts of one round that the retraining receives.

    Attributes:
        number: number of this round, 1 to `rounds`.
        rounds: number of all rounds.
        sparsity: current sparsity of the masks.
        folder: folder for the files of the retraining. They are removed after the weights of the
            round are saved. None saves nothing.
    """

    number: int
    rounds: int
    sparsity: float
    folder: Path | None = None


Retrain = Callable[[Round], None]
"""Trains the model in place and holds the masks."""


class KeepEarly:
    """A hook of the training loop that writes the weights to a file after a given step.

    Args:
        step: the step to write after, from 1. For step 0, call `write_weights` before training.
        file: the file of the weights.
    """

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`."""
        if step == self.step:
            write_weights(model, self.file)

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: the file is the state."""
        return {}


def write_weights(model: Any, file: Path) -> None:
    """Write all parameters of a model. The file is complete, or it does not exist.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    write_whole(file, dict(model.named_parameters()))


@torch.no_grad()
def read_weights(model: Any, file: Path) -> None:
    """Overwrite the parameters of a model with the values in a file.

    Raises:
        CheckpointError: the file is missing.
        RecipeError: the file has other parameters or other shapes.
    """
    if not file.is_file():
        raise CheckpointError(
            "there are no weights to go back to",
            where=str(file),
            remedy="keep them with KeepEarly while the model is trained",
        )
    own = dict(model.named_parameters())
    with safe_open(file, framework="pt") as stored:
        shapes = {n: tuple(stored.get_slice(n).get_shape()) for n in stored.keys()}  # noqa: SIM118
        wrong = [n for n, p in own.items() if shapes.get(n) != tuple(p.shape)]
        wrong += [n for n in shapes if n not in own]
        if wrong:
            raise RecipeError(
                "the weights in the file are of another model",
                where=f"{', '.join(wrong[:4])} in {file}",
                remedy="rewind to weights of the same training",
            )
        for name, parameter in own.items():
            parameter.copy_(stored.get_tensor(name))


def prune_in_rounds(
    model: Any,
    kept: Mapping[str, Tensor],
    how: PruningRounds,
    retrain: Retrain,
    early: Path | None = None,
    saved: Path | None = None,
) -> list[Round]:
    """Prune and retrain a model in rounds, in place.

    With a folder, each round stores its masks and weights there. A second call with the same
    folder resumes. It loads the last finished round, and the masks of the next one if they are
    stored.

    Args:
        model: a trained model, dense or pruned.
        kept: the masks that `retrain` holds, True = kept, by parameter; changed in place.
        how: sparsities, criterion, rewinding.
        retrain: called once for each round.
        early: file of the early weights, with rewind `weights`; see `KeepEarly`.
        saved: folder for the state of a resumed call; None saves nothing.

    Returns:
        The rounds that this call did.

    Raises:
        CheckpointError: rewind `weights` needs a file of early weights, and there is none.
        VerificationError: `retrain` did not hold the masks.
    """
    found = _SavedRounds(saved)
    finished, done = found.resume(model, kept), []
    for number, sparsity in enumerate(levels(how.schedule, how.rounds), start=1):
        if number <= finished:
            continue
        masks = found.masks(number)
        if masks is None:
            masks = how.criterion.masks(model, kept, sparsity)
            found.keep_masks(number, masks)
        if how.rewind == "weights":
            read_weights(model, early or Path())
        renew(model, kept, masks)
        this = Round(number, how.rounds, sparsity, found.folder(number))
        retrain(this)
        Masks(kept).check(model)
        found.keep_round(number, model)
        done.append(this)
    return done


class _SavedRounds:
    """The files of a run in rounds.

    round-N/                      the retraining of round N, while it runs
    round-N.masks.safetensors     from the beginning of round N to the end of round N + 1
    round-N.weights.safetensors   from the end of round N to the end of round N + 1
    """

    def __init__(self, place: Path | None) -> None:
        self.place = place
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)

    def file(self, number: int, what: str) -> Path:
        """A file of a round."""
        return (self.place or Path()) / f"round-{number}.{what}.safetensors"

    def folder(self, number: int) -> Path | None:
        """The folder for the retraining of a round."""
        return None if self.place is None else self.place / f"round-{number}"

    def resume(self, model: Any, kept: Mapping[str, Tensor]) -> int:
        """Load the last finished round; returns its number, 0 for none."""
        if self.place is None:
            return 0
        finished = self.place.glob("round-*.weights.safetensors")
        numbers = [int(file.name.split(".")[0].removeprefix("round-")) for file in finished]
        number = max(numbers, default=0)
        for older in set(numbers) - {number}:
            self.forget(older)
        if number:
            read_weights(model, self.file(number, "weights"))
            for name, mask in (self.masks(number) or {}).items():
                kept[name].copy_(mask)
        return number

    def masks(self, number: int) -> dict[str, Tensor] | None:
        """The masks of a round, if they are stored."""
        file = self.file(number, "masks")
        stored = self.place is not None and file.exists()
        return dict(stored_masks(file)) if stored else None

    def keep_masks(self, number: int, masks: Mapping[str, Tensor]) -> None:
        """Store the masks of a new round."""
        if self.place is not None:
            write_whole(self.file(number, "masks"), masks)

    def keep_round(self, number: int, model: Any) -> None:
        """Store the weights of a finished round, and remove files that no resumed run needs."""
        if self.place is None:
            return
        write_weights(model, self.file(number, "weights"))
        self.forget(number - 1)
        shutil.rmtree(self.place / f"round-{number}", ignore_errors=True)

    def forget(self, number: int) -> None:
        """Remove the files of a round."""
        for what in ("weights", "masks"):
            self.file(number, what).unlink(missing_ok=True)
