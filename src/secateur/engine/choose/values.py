"""Chooses how each matrix is stored: the smallest files whose loss stays within a bound.

The candidates are checkpoints of one model whose linears were rounded to more or fewer bits. Level
0 is the model itself, and each further level is smaller. A candidate takes each linear from one of
them, and its loss is measured on the whole model, with activations rounded where the kernels will
round them:

1. All linears on one level. The smallest level within the bound is the base. If it is the last
   level, it is the answer.
2. From the base, the linears of one decoder layer at a time go one level further. The rise of the
   loss is shared out among the linears of the layer by their output errors.
3. The linears go one level further in the order of rise per saved byte. Bisection finds how many
   can go within the bound.

So the answer is a candidate whose loss was measured. It need not be the smallest one of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.choose.tournament import (
    Lockstep,
    Tournament,
    cut_windows,
    fingerprint,
)
from secateur.engine.choose.weight_variants import WeightVariants
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import Linear
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Progress
from secateur.sparsity.evolution import Candidate

RANKING_TOKENS = 2048
"""Tokens on which a layer's rise of the loss is measured; the whole text decides in the end."""

LEAST_RISE = 1e-6
"""A rise of the loss in nats below which the measurement says nothing."""


@dataclass(frozen=True)
class Level:
    """One way to store every linear.

    Attributes:
        reader: the checkpoint whose linears have these values.
        bytes_of: the size of each linear when stored, by its name.
        error_of: the squared relative error of each linear's outputs, ‖(W − Ŵ)X‖² / ‖WX‖²; empty
            for level 0.
        rounds_inputs: whether the values are integers, so that kernels round the inputs.
    """

    reader: CheckpointReader
    bytes_of: Mapping[str, int]
    error_of: Mapping[str, float]
    rounds_inputs: bool = False


@dataclass(frozen=True)
class ChosenLevels:
    """The result of a choice.

    Attributes:
        level_of: the level of each linear, by its name.
        loss: mean loss of the next token with these levels, in nats.
        source_loss: that of level 0, on the same text.
        uniform_loss: the loss with all linears on one level, for each level.
    """

    level_of: dict[str, int]
    loss: float
    source_loss: float
    uniform_loss: tuple[float, ...]


@torch.no_grad()
def choose_levels(
    target: CheckpointTarget,
    levels: Sequence[Level],
    windows: Tensor,
    bound: float,
    file: Path | None,
    progress: Progress,
) -> ChosenLevels:
    """Choose the level of every linear.

    Args:
        target: the model of level 0.
        levels: at least two; each is stored in fewer bytes than the one before.
        windows: tokens to measure the loss on [windows, length].
        bound: how much the loss may rise above that of level 0, in nats per token.
        file: file of the measured values, which a stopped run resumes from; None for none.
        progress: receives the steps.
    """
    names = list(levels[0].bytes_of)
    tokens = windows.numel()
    ends = ModelEnds(target, cut_windows(windows, tokens))
    variants = StoredVariants(ends, names, levels)
    tournament = Tournament(
        Lockstep(ends, variants, "loss", progress),
        variants.versions,
        file,
        {**fingerprint(ends, tokens, "loss", names), "levels": len(levels)},
    )
    progress.start("choosing values", len(levels) + len(target.layers) + len(names).bit_length())
    every = [(level,) * len(names) for level in range(len(levels))]
    losses = tuple(tournament(every, tokens, 0))
    progress.step(len(levels))
    allowed = losses[0] + bound
    base = max(level for level, loss in enumerate(losses) if level == 0 or loss <= allowed)
    best, loss = every[base], losses[base]
    if base + 1 < len(levels):
        order = further_order(tournament, variants, levels, base, progress)
        best, loss = furthest(tournament, best, loss, order, allowed, tokens, progress)
    progress.finish()
    return ChosenLevels(dict(zip(names, best, strict=True)), loss, losses[0], losses)


def further_order(
    tournament: Tournament,
    variants: StoredVariants,
    levels: Sequence[Level],
    base: int,
    progress: Progress,
) -> list[int]:
    """The places of linears, by the rise of the loss per byte saved on the level after `base`."""
    names = variants.names
    here, further = levels[base], levels[base + 1]
    (reference,) = tournament([(base,) * len(names)], RANKING_TOKENS, 0)
    rise_per_byte = {}
    for places in variants.places:
        tried = tuple(base + (place in places) for place in range(len(names)))
        (loss,) = tournament([tried], RANKING_TOKENS, 0)
        rise = max(loss - reference, LEAST_RISE)
        errors = {place: further.error_of[names[place]] for place in places}
        total = sum(errors.values()) or 1.0
        for place, error in errors.items():
            saved = here.bytes_of[names[place]] - further.bytes_of[names[place]]
            rise_per_byte[place] = rise * error / total / max(saved, 1)
        progress.step()
    return sorted(rise_per_byte, key=rise_per_byte.__getitem__)


def furthest(
    tournament: Tournament,
    base: Candidate,
    loss: float,
    order: Sequence[int],
    allowed: float,
    tokens: int,
    progress: Progress,
) -> tuple[Candidate, float]:
    """The base with as many linears one level further, in order, as the bound allows."""
    best, low, high = base, 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        raised = set(order[:middle])
        tried = tuple(level + (place in raised) for place, level in enumerate(base))
        (found,) = tournament([tried], tokens, 0)
        if found <= allowed:
            best, loss, low = tried, found, middle
        else:
            high = middle
        progress.step()
    return best, loss


class StoredVariants(WeightVariants):
    """Decoder layers whose linears come from several checkpoints.

    Args:
        ends: ends of the model of level 0.
        names: names of the linears; a candidate has a level for each.
        levels: the checkpoints.
    """

    def __init__(self, ends: ModelEnds, names: Sequence[str], levels: Sequence[Level]) -> None:
        super().__init__(ends, names)
        self.levels = levels

    def source(self, number: int) -> AbstractContextManager[Any]:
        """Nothing to open: readers read single tensors."""
        return nullcontext()

    def rounds_inputs(self, level: int | None) -> bool:
        """Whether the values of a level are integers."""
        return bool(level) and self.levels[level or 0].rounds_inputs

    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight of a level above 0."""
        if not level:
            return None
        target = self.ends.target
        assert isinstance(target, CheckpointTarget)
        weight = self.levels[level].reader.read(target.stored[f"{linear.name}.weight"])
        return weight.to(target.device, target.dtype)
