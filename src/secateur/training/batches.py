"""The token windows that each training step reads. All are full; a seed sets their order.

Training windows and validation windows must differ.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration import windows as window_rules
from secateur.calibration.continuation import SEQUENCE, shared_share
from secateur.calibration.documents import read_text
from secateur.calibration.run_windows import WindowReader
from secateur.errors import RecipeError, SourceError
from secateur.models.architecture import positions_of
from secateur.models.tokenizer import load_tokenizer, start_tokens_of
from secateur.recipes.train import TrainRecipe
from secateur.types import Windows

log = logging.getLogger(__name__)

LENGTH = 512
HELD_OUT_AT_MOST = 8
"""At most one window in this many is held out if the recipe has no validation text."""
REFUSED = 0.01
"""The share of a validation text that training may read; conversations may share prompts."""


@dataclass(frozen=True)
class Batch:
    """A few windows of the training text.

    Attributes:
        ids: token ids [windows, length].
        numbers: their positions in the training text.
        answers: which tokens the loss counts, bool [windows, length]; None if all.
        count: the loss is a sum over tokens, divided by this number.
    """

    ids: Tensor
    numbers: tuple[int, ...]
    answers: Tensor | None = None
    count: float | None = None

    @property
    def targets(self) -> Tensor:
        """The token after each, [windows · length]; −100 where the loss does not count it."""
        after = self.ids[:, 1:]
        if self.answers is not None:
            after = after.where(self.answers[:, 1:], -100)
        return torch.cat([after, after.new_full((len(after), 1), -100)], dim=1).flatten()


@dataclass(frozen=True)
class Batches:
    """The windows of every step.

    Each epoch reads all windows once, in its own order. A step may reach into the next epoch.
    The windows of a step depend only on the seed and the step number, so a resumed run reads
    the same windows.

    Args:
        windows: token ids [windows, length].
        size: number of windows in a step.
        seed: seed of the orders.
        chosen: the windows of a step, counted from 0, in an order that replaces epochs.
        answers: which tokens the loss counts, as the windows; None if all. The loss of a step is
            the mean over its answers.
    """

    windows: Tensor
    size: int
    seed: int = 0
    chosen: Callable[[int], tuple[int, ...]] | None = None
    answers: Tensor | None = None

    def numbers(self, step: int) -> tuple[int, ...]:
        """Return the windows of a step, counted from 0."""
        if self.chosen is not None:
            return self.chosen(step)
        count = len(self.windows)
        places = range(step * self.size, (step + 1) * self.size)
        # A step touches two epochs at most, unless it is larger than one; each order is drawn once.
        orders = {p // count: self.order(p // count) for p in (places[0], places[-1])}
        return tuple((orders.get(p // count) or self.order(p // count))[p % count] for p in places)

    def order(self, epoch: int) -> list[int]:
        """Return the order of the windows in an epoch."""
        # a large prime, so that the seeds of neighbouring trainings do not share epochs
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.windows), generator=drawn).tolist()
        return order

    def parts(
        self, numbers: Sequence[int], size: int, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> list[Batch]:
        """Return the windows of a step in parts; the loop runs one part at a time.

        Args:
            numbers: the windows of the step.
            size: maximum number of windows in a part.
            device: where the ids go.
            rank: rank of this process.
            ranks: how many processes share the step.
        """
        mine = tuple(numbers[rank::ranks])
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        ids = [self.windows[list(part)].to(device) for part in parts]
        if self.answers is None:
            return [*map(Batch, ids, parts)]
        answers = [self.answers[list(part)].to(device) for part in parts]
        # every part divides by its share of the step's answers, so the parts add up to their mean
        each = max(1, int(self.answers[list(numbers), 1:].sum())) / len(numbers)
        return [*map(Batch, ids, parts, answers, (each * len(part) for part in parts))]


def read_training_text(
    recipe: TrainRecipe, folder: Path, config: Any, batch: int
) -> tuple[Batches, Batches | None, dict[str, Any]]:
    """Return the windows of a recipe.

    Args:
        recipe: names the texts.
        folder: folder of the model, for its tokenizer.
        config: configuration of the model, for its context and vocabulary.
        batch: number of windows of a step.

    Returns:
        The training windows, the validation windows (None for none), and the source of both as
        JSON values.

    Raises:
        SourceError: a text is not available, or is too short for one step.
        RecipeError: the training text contains the validation text, or the windows are longer
            than the model's context.
    """
    length = recipe.sequence_length or min(LENGTH, positions_of(config) or LENGTH)
    start = start_tokens_of(folder)
    windows, answers = _windows_of(recipe, folder, length, config)
    validation, watched, judged = None, "none", None
    if recipe.validation_windows and recipe.validation_text is not None:
        tokenizer = load_tokenizer(folder)
        text = read_text(recipe.validation_text)
        validation, judged = window_rules.evaluation_with_answers(
            text.text,
            tokenizer,
            windows.shape[1],
            max_windows=recipe.validation_windows,
            answers=recipe.answers_only is not False,
        )
        watched = text.dataset
    elif recipe.validation_windows:
        held = min(recipe.validation_windows, len(windows) // HELD_OUT_AT_MOST)  # the first ones
        validation = windows[:held] if held else None
        windows, watched = windows[held:], f"{held} windows held out of the text"
        if answers is not None:
            answers, judged = answers[held:], answers[:held] if held else None
    if len(windows) < batch:
        raise SourceError(
            f"the text gives {len(windows)} windows of {length} tokens, one step needs {batch}",
            where=", ".join(recipe.text),
            remedy="name a longer text, or ask for a shorter sequence length or a smaller batch",
        )
    if answers is not None and not answers.any():
        raise SourceError(
            "the conversations have no answer of the assistant to learn",
            where=", ".join(recipe.text),
            remedy="name other conversations, or train on whole ones (--whole-conversations)",
        )
    shared, watching = None, None
    if validation is not None:
        watching = Batches(validation, len(validation), answers=judged)
        # start tokens are in every window, so they would count as text that both share
        own, other = (window_rules.without_start(x, start) for x in (windows, validation))
        shared = shared_share(own, other)
        if recipe.validation_text is not None:
            _check_shared(shared, watched, REFUSED if judged is None else 1 - REFUSED)
    begins = start and window_rules.begins_with(windows, start)
    record = {
        "source": ", ".join(recipe.text),
        "windows": len(windows),
        "sequence_length": windows.shape[1],
        **({"start_tokens": list(start)} if begins else {}),
        "tokens": windows.numel(),
        "sha256": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
        "validation": watched,
        "validation_windows": 0 if validation is None else len(validation),
        "validation_shared": shared,
        **({} if answers is None else {"answer_tokens": int(answers.sum())}),
    }
    return Batches(windows, batch, recipe.seed, answers=answers), watching, record


def _check_shared(shared: float, watched: str, limit: float) -> None:
    """Refuse a validation text that the training reads."""
    if shared > limit:
        raise RecipeError(
            f"{shared:.1%} of the sequences of {SEQUENCE} tokens in the validation text are in the "
            "training text too, so its perplexity would say nothing",
            where=watched,
            remedy="name another --validation-text, or leave it out: windows of the text are then "
            "held out of the training",
        )
    if shared:
        log.warning("%.2g %% of the text %s is in the training text too", 100 * shared, watched)


def _windows_of(
    recipe: TrainRecipe, folder: Path, length: int, config: Any
) -> tuple[Windows, Tensor | None]:
    """Return the windows of all texts, up to the number in the recipe, and their answers.

    Several texts contribute equally: each gives as many windows as the shortest, alternating. In a
    mix with conversations, all tokens of a text count as answers.
    """
    reader = WindowReader.of_folder(folder, config)
    plan = window_rules.WindowPlan(-(-recipe.windows // len(recipe.text)), length, recipe.seed)
    read = [
        reader.read_up_to(text, plan, recipe.field, answers=recipe.answers_only is not False)
        for text in recipe.text
    ]
    if recipe.answers_only and all(marks is None for _, marks in read):
        raise RecipeError(
            "--answers-only changes nothing: there are neither conversations nor pairs of prompt "
            "and completion, so the model learns every token",
            where=", ".join(recipe.text),
            remedy="leave it out, or name a text with answers",
        )
    found = [windows for windows, _ in read]
    if len({windows.shape[1] for windows in found}) > 1:
        lengths = [f"{text}: {w.shape[1]}" for text, w in zip(recipe.text, found, strict=True)]
        raise SourceError(
            f"the texts have windows of different lengths ({', '.join(lengths)})",
            remedy="make the windows of one length, or give the texts themselves",
        )
    each = min(map(len, found))
    answers = None
    if any(marks is not None for _, marks in read):
        marked = [torch.ones_like(w, dtype=torch.bool) if m is None else m for w, m in read]
        # in the order of the windows: one of each text, then the next of each
        answers = torch.stack([marks[:each] for marks in marked], 1).flatten(0, 1)
    return torch.stack([windows[:each] for windows in found], 1).flatten(0, 1), answers
