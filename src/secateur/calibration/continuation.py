"""More calibration windows, written by the dense model itself.

A model that is fitted to a few windows fits what is special about them as well. What it should
have learned from more text is in the model: it can write that text. Each new window begins with a
few tokens of a calibration window and goes on as the model would,

    token_i ~ softmax(logits(token_1 … token_{i−1}))

drawn at temperature 1 with nothing cut off, so that the windows are distributed as the model
believes text to be.

Paper: Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning",
arXiv:2410.17170. There a text begins with the start token alone and its temperature falls from a
tuned value; here it begins in a calibration window, which keeps it near what the user chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.errors import SourceError
from secateur.types import Windows

__all__ = ["AT_ONCE", "PREFIX", "continue_windows"]

PREFIX = 16
"""Tokens that a new window takes from a calibration window."""

AT_ONCE = 64
"""Windows that are written together."""


def continue_windows(
    model: Any,
    windows: Windows,
    count: int,
    *,
    seed: int,
    tell: Callable[[], None] = lambda: None,
) -> Int64[Tensor, "count sequence_length"]:
    """Windows that a model writes.

    Args:
        model: a dense transformers causal language model in eval mode.
        windows: calibration windows [samples, sequence_length].
        count: how many to write.
        seed: of the beginnings and of the draws.
        tell: called for every token of a batch of at most 64 windows.

    Returns:
        Token ids [count, sequence_length], int64, on the CPU.

    Raises:
        SourceError: the windows are too short to begin and to go on.
    """
    samples, length = windows.shape
    if length <= PREFIX:
        raise SourceError(
            f"windows of {length} tokens leave nothing to write after the first {PREFIX}",
            remedy=f"use a sequence length above {PREFIX}, or no generated windows",
        )
    written = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, count, AT_ONCE):
            rows = torch.arange(first, min(first + AT_ONCE, count)) % samples
            starts = torch.randint(0, length - PREFIX, (len(rows), 1))
            beginnings = windows[rows[:, None], starts + torch.arange(PREFIX)]
            written.append(continued(model, beginnings, length, tell).cpu())
    return torch.cat(written) if written else windows[:0]


def continued(model: Any, beginnings: Tensor, length: int, tell: Callable[[], None]) -> Tensor:
    """Go on from [windows, PREFIX] tokens to [windows, length]."""

    def watch(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tell()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = beginnings.to(model.device)
    # what is not said here is taken from the model's own generation configuration, which may cut
    # off the tail or punish repetition; so that has to be a blank one meanwhile
    own = model.generation_config
    model.generation_config = type(own)()
    try:
        tokens: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=length,
            min_length=length,  # no window ends early
            eos_token_id=own.eos_token_id,
            pad_token_id=0,
            stopping_criteria=[watch],
        )
    finally:
        model.generation_config = own
    return tokens
