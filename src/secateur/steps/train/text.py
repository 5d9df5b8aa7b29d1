"""The text of a training: training windows and validation windows, which must differ."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.continuation import SEQUENCE, shared_share
from secateur.calibration.documents import read_text
from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import WindowPlan, begins_with, without_start
from secateur.errors import RecipeError, SourceError
from secateur.evaluation.perplexity import evaluation_windows
from secateur.models.architecture import positions_of
from secateur.models.tokenizer import load_tokenizer, start_tokens_of
from secateur.recipes.train import TrainRecipe
from secateur.training.teachers import windows_digest
from secateur.types import Windows

log = logging.getLogger(__name__)

LENGTH = 512
HELD_OUT_AT_MOST = 8
"""At most one window in this many is held out if the recipe has no validation text."""
REFUSED = 0.01


@dataclass(frozen=True)
class TrainingText:
    """The windows of a training.

    Attributes:
        windows: token ids [samples, sequence_length].
        validation: validation windows, likewise; None for none.
        record: the source of both, as JSON values.
    """

    windows: Windows
    validation: Windows | None
    record: dict[str, Any]


def read_training_text(recipe: TrainRecipe, folder: Path, config: Any) -> TrainingText:
    """Return the windows of a recipe.

    Args:
        recipe: names the texts.
        folder: folder of the model, for its tokenizer.
        config: configuration of the model, for its context and vocabulary.

    Raises:
        SourceError: a text is not available, or is too short for one step.
        RecipeError: the training text contains the validation text, or the windows are longer
            than the model's context.
    """
    length = recipe.sequence_length or min(LENGTH, positions_of(config) or LENGTH)
    start = start_tokens_of(folder, trust_remote_code=recipe.trust_remote_code)
    windows = _windows_of(recipe, folder, length, config)
    validation, watched = None, "none"
    if recipe.validation_windows and recipe.validation_text is not None:
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
        text = read_text(recipe.validation_text)
        validation = evaluation_windows(
            text.text, tokenizer, windows.shape[1], max_windows=recipe.validation_windows
        )
        watched = text.dataset
    elif recipe.validation_windows:
        held = min(recipe.validation_windows, len(windows) // HELD_OUT_AT_MOST)
        validation = windows[:held] if held else None
        windows, watched = windows[held:], f"{held} windows held out of the text"
    if len(windows) < recipe.batch:
        raise SourceError(
            f"the text gives {len(windows)} windows of {length} tokens, one step needs "
            f"{recipe.batch}",
            where=", ".join(recipe.text),
            remedy="name a longer text, or ask for a shorter sequence length or a smaller batch",
        )
    shared = None
    if validation is not None:
        shared = shared_share(without_start(windows, start), without_start(validation, start))
    if shared and recipe.validation_text is not None:
        _refuse_overlap(shared, watched)
    return TrainingText(
        windows,
        validation,
        {
            "source": ", ".join(recipe.text),
            "windows": len(windows),
            "sequence_length": windows.shape[1],
            **({"start_tokens": list(start)} if start and begins_with(windows, start) else {}),
            "tokens": windows.numel(),
            "sha256": windows_digest(windows),
            "validation": watched,
            "validation_windows": 0 if validation is None else len(validation),
            "validation_shared": shared,
        },
    )


def _windows_of(recipe: TrainRecipe, folder: Path, length: int, config: Any) -> Windows:
    """Return the windows of all texts, up to the number in the recipe.

    Several texts contribute equally: each gives as many windows as the shortest, in turns.
    """
    reader = WindowReader.of_folder(folder, config, trust_remote_code=recipe.trust_remote_code)
    plan = WindowPlan(-(-recipe.windows // len(recipe.text)), length, recipe.seed)
    found = [reader.read_up_to(text, plan, recipe.field) for text in recipe.text]
    if len({windows.shape[1] for windows in found}) > 1:
        lengths = [f"{text}: {w.shape[1]}" for text, w in zip(recipe.text, found, strict=True)]
        raise SourceError(
            f"the texts have windows of different lengths ({', '.join(lengths)})",
            remedy="make the windows of one length, or give the texts themselves",
        )
    each = min(map(len, found))
    return torch.stack([windows[:each] for windows in found], 1).flatten(0, 1)


def _refuse_overlap(shared: float, watched: str) -> None:
    """Refuse training text that contains validation text; warn if it shares only a few phrases."""
    if shared > REFUSED:
        raise RecipeError(
            f"{shared:.1%} of the sequences of {SEQUENCE} tokens in the validation text are in "
            "the training text too, so its perplexity would say nothing",
            where=watched,
            remedy="watch another text, or leave that one out of the training",
        )
    log.warning("%.2g %% of the text %s is in the training text too", 100 * shared, watched)
