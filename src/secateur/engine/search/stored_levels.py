"""Chooses how each matrix is stored, from measurements on the model.

The candidates are checkpoints of one model whose linears were rounded or pruned to several levels.
Level 0 is the model itself. A candidate takes each linear from one of the levels. Activations are
rounded where the kernels will round them.

`choose_levels` finds the smallest files whose loss stays within a bound; each further level is
smaller:

1. All linears on one level. The smallest level within the bound is the base. If it is the last
   level, it is the answer.
2. From the base, the linears of one decoder layer at a time go one level further. The rise of the
   loss is shared out among the linears of the layer by their output errors.
3. The linears go one level further in the order of rise per saved byte (`knapsack.Knapsack`).
   Bisection finds how many can go within the bound.

So the answer is a candidate whose loss was measured. It need not be the smallest one of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.engine.search.candidate_evaluator import (
    WeightVariants,
    cut_windows,
)
from secateur.engine.search.knapsack import Knapsack
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.architecture import Linear
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Progress
from secateur.quantization.activations import Shares
from secateur.sparsity.evolution import Candidate

SURVEY_TOKENS = 2048
"""Tokens on which single layers are measured; the whole text decides in the end."""

LEAST_RISE = 1e-6
"""A rise of the loss in nats below which the measurement says nothing."""


@dataclass(frozen=True)
class Level:
    """A form in which all linears are stored.

    Attributes:
        name: such as `50 % int4`.
        reader: the checkpoint whose linears have these values.
        bytes_of: the size of each linear when stored, by its name.
        error_of: the squared relative error of each linear's outputs, ‖(W − Ŵ)X‖² / ‖WX‖²; empty
            for level 0.
        rounded_inputs: how kernels round the inputs, if the values are integers.
    """

    name: str
    reader: CheckpointReader
    bytes_of: Mapping[str, int]
    error_of: Mapping[str, float]
    rounded_inputs: Shares | None = None


class StoredVariants(WeightVariants):
    """Decoder layers whose linears come from several checkpoints.

    Args:
        outer: embedding and head of the model of level 0.
        names: names of the linears; a candidate has a level for each.
        levels: the checkpoints.
    """

    def __init__(
        self, outer: EmbeddingAndHead, names: Sequence[str], levels: Sequence[Level]
    ) -> None:
        super().__init__(outer, names)
        self.levels = levels

    def source(self, number: int) -> AbstractContextManager[Any]:
        """Nothing to open: readers read single tensors."""
        return nullcontext()

    def rounded_inputs(self, level: int | None) -> Shares | None:
        """How a level rounds the inputs of its linears; None if it does not."""
        return self.levels[level].rounded_inputs if level else None

    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight of a level above 0."""
        if not level:
            return None
        target = self.outer.target
        assert isinstance(target, CheckpointTarget)
        weight = self.levels[level].reader.read(target.stored[f"{linear.name}.weight"])
        return weight.to(target.device, target.dtype)


class LevelEvaluator:
    """Measures candidates that take each linear from one of the levels.

    Args:
        target: the model of level 0.
        levels: the levels.
        names: names of the linears; a candidate has a level for each.
        windows: tokens to measure on [windows, length].
        objective: `divergence` or `loss` (`CandidateEvaluator`).
        file: file of the measured values, which a stopped run resumes from; None for none.
        progress: receives the steps.
    """

    def __init__(
        self,
        target: CheckpointTarget,
        levels: Sequence[Level],
        names: Sequence[str],
        windows: Tensor,
        objective: str,
        file: Path | None,
        progress: Progress,
    ) -> None:
        self.levels, self.names = list(levels), list(names)
        self.tokens, self.progress = windows.numel(), progress
        variants = StoredVariants(EmbeddingAndHead(target, windows), self.names, self.levels)
        self.layers = [places for places in variants.places if places]
        labels = [level.name for level in self.levels]
        self.fitness = variants.fitness(objective, self.tokens, file, progress, levels=labels)

    def measured(self, *candidates: Candidate) -> list[float]:
        """The loss or divergence of candidates on all windows."""
        return self.fitness(candidates, self.tokens, 0)

    def single(self, level: int) -> Candidate:
        """The candidate with all linears on one level."""
        return (level,) * len(self.names)

    def by_layer(self, base: int, probe: int) -> Iterator[tuple[list[int], float]]:
        """The linears of each layer, and what is measured if only they go from base to probe."""
        for places in self.layers:
            tried = tuple(probe if n in places else base for n in range(len(self.names)))
            (found,) = self.fitness([tried], SURVEY_TOKENS, 0)
            yield places, found
            self.progress.step()


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
    windows = cut_windows(windows, windows.numel())
    model = LevelEvaluator(target, levels, names, windows, "loss", file, progress)
    steps = len(levels) + len(model.layers) + len(names).bit_length()
    progress.start("choosing values", steps)
    losses = model.measured(*map(model.single, range(len(levels))))
    progress.step(len(levels))
    allowed = losses[0] + bound
    base = max(level for level, loss in enumerate(losses) if level == 0 or loss <= allowed)
    best, loss = model.single(base), losses[base]
    if base + 1 < len(levels):
        # bisect the candidates between the base and the next level
        raised = _raised_in_order(model, base)
        low, high = 0, len(raised) - 1
        while high - low > 1:
            middle = (low + high) // 2
            (found,) = model.measured(raised[middle])
            if found <= allowed:
                best, loss, low = raised[middle], found, middle
            else:
                high = middle
            progress.step()
    progress.finish()
    return ChosenLevels(dict(zip(names, best, strict=True)), loss, losses[0], tuple(losses))


def _raised_in_order(model: LevelEvaluator, base: int) -> list[Candidate]:
    """Candidates from the base to the next level, one linear after the other, cheapest first."""
    names, pair = model.names, (base, base + 1)
    here, further = (model.levels[level] for level in pair)
    (reference,) = model.fitness([model.single(base)], SURVEY_TOKENS, 0)
    rises = [0.0] * len(names)
    for places, loss in model.by_layer(*pair):
        rise = max(loss - reference, LEAST_RISE)
        total = sum(further.error_of[names[n]] for n in places) or 1.0
        for n in places:
            rises[n] = max(rise * further.error_of[names[n]] / total, 1e-300)
    cost = tuple(((float(here.bytes_of[n]),), (float(further.bytes_of[n]),)) for n in names)
    knapsack = Knapsack(cost, tuple((0.0, rise) for rise in rises))
    price = [[level[0] for level in unit] for unit in cost]
    return [
        tuple(base + level for level in chosen) for chosen, _ in knapsack.descent(price, (0, 1))
    ]
