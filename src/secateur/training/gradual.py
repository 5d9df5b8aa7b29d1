"""Gradual pruning: the training prunes a little more every few steps. Regrowth restores weights.

The pruning is a hook of the training loop. It changes the masks that the loop holds. Any score and
pattern select the weights to keep (`Criterion`).

The engine gathers the statistics of scores with one decoder layer in memory. A model in training is
in memory anyway, so this module uses ordinary forwards and backwards with the current weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import Gathering, watched
from secateur.errors import NumericalError, RecipeError
from secateur.models.architecture import Linear, describe, linears_of
from secateur.precision import full_float32
from secateur.recipes.train import GradualOptions
from secateur.sparsity.allocation.global_threshold import global_threshold
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.patterns.n_of_m import NOfM
from secateur.sparsity.patterns.unstructured import Unstructured
from secateur.sparsity.schedules import Schedule
from secateur.sparsity.scores import ScoreFunction
from secateur.sparsity.scores.magnitude import Magnitude
from secateur.training.masks import moments
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
        self,
        model: Any,
        kept: Mapping[str, Tensor],
        sparsity: float,
        exchanged: float = 0.0,
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
    score: Score,
    kept: Mask,
    gradient: Score,
    pattern: Pattern,
    sparsity: float,
    fraction: float,
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
                if backward:
                    _differentiate(logits, ids.to(device), linears, number)
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


def _differentiate(logits: Tensor, ids: Tensor, linears: Sequence[Linear], number: int) -> None:
    """The backward of a window's loss, to the weights of linears."""
    loss = cross_entropy(logits[0, :-1].float(), ids[1:])
    if not torch.isfinite(loss):
        raise NumericalError(
            f"the loss of window {number} is {loss.item()}",
            remedy="lower the learning rate, or use float32 or bfloat16",
        )
    torch.autograd.grad(loss, [x.module.get_parameter("weight") for x in linears])


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
        for moment in moments(optimizer, parameter) if optimizer is not None else ():
            moment.masked_fill_(gone, 0.0)
