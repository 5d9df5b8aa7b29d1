"""Extra calibration windows that the dense model generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocator import TRAINING_BLOCK_BYTES, TRAINING_BYTES, reused_pages
from secateur.calibration.continuation import AT_ONCE, PREFIX, continue_windows
from secateur.models.opening import load_whole
from secateur.models.skeleton import quiet_transformers
from secateur.models.tokenizer import start_tokens_of
from secateur.precision import fast_dtype
from secateur.progress import Progress
from secateur.workflows.prune.prepare import Prepared


def with_own_windows(prepared: Prepared, progress: Progress) -> Prepared:
    """Add the windows that the dense model must generate for the recipe.

    The whole model is in memory while it generates, and is freed afterwards.
    """
    assert prepared.windows is not None
    assert prepared.calibration is not None
    windows = with_written(
        prepared.source.folder,
        prepared.windows,
        prepared.unwritten,
        prepared.recipe.calibration.seed,
        prepared.target.device,
        progress,
        trust_remote_code=prepared.recipe.trust_remote_code,
    )
    told = {"generated": prepared.unwritten, "generated_prefix": PREFIX}
    calibration = {**prepared.calibration, **told}
    return dataclasses.replace(prepared, windows=windows, unwritten=0, calibration=calibration)


def with_written(
    folder: Path,
    windows: Tensor,
    count: int,
    seed: int,
    device: torch.device,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Tensor:
    """Append `count` windows that the dense model of a folder generates."""
    start = start_tokens_of(folder, trust_remote_code=trust_remote_code)
    model = load_whole(
        folder, device, dtype=fast_dtype(device), trust_remote_code=trust_remote_code
    )
    return torch.cat([windows, own_windows(model, windows, count, start, seed, progress)])


def own_windows(
    model: Any,
    windows: Tensor,
    count: int,
    start: Sequence[int],
    seed: int,
    progress: Progress,
) -> Tensor:
    """Generate windows [count, sequence_length] after the start tokens."""
    batches = -(-count // AT_ONCE)
    progress.start("writing windows", batches * (windows.shape[1] - len(start) - PREFIX))
    # its blocks of many sizes would fragment the memory for all later work
    with quiet_transformers(), reused_pages(TRAINING_BLOCK_BYTES, TRAINING_BYTES):
        own = continue_windows(
            model, windows, count, seed=seed, start=start, on_token=progress.step
        )
    progress.finish()
    return own
