"""More calibration windows, written by the dense model itself.

A model that is fitted to a few windows fits what is special about them as well. What it should
have learned from more text is in the model: it can write that text. Each new window begins with a
few tokens of a calibration window and goes on as the model would,

    token_i ~ softmax(logits(token_1 … token_{i−1}))

drawn at temperature 1 with nothing cut off, so that the windows are distributed as the model
believes text to be. Where windows begin with a start token, new ones do too, before those few.

Paper: Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning",
arXiv:2410.17170. There a text begins with the start token alone and its temperature falls from a
tuned value; here it begins in a calibration window, which keeps it near what the user chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.calibration.cutting import without_start
from secateur.errors import SourceError
from secateur.models.cache import OneTokenAttention, roomy_cache
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
    start: Sequence[int] = (),
    tell: Callable[[], None] = lambda: None,
) -> Int64[Tensor, "count sequence_length"]:
    """Windows that a model writes.

    Args:
        model: a dense transformers causal language model in eval mode.
        windows: calibration windows [samples, sequence_length].
        count: how many to write.
        seed: of the beginnings and of the draws.
        start: tokens that the model's tokenizer puts in front of a text. A new window begins with
            them and has none of them later.
        tell: called for every token of a batch of at most 64 windows.

    Returns:
        Token ids [count, sequence_length], int64, on the CPU.

    Raises:
        SourceError: the windows are too short to begin and to go on, or the model keeps no keys
            and values.
    """
    samples, length = windows.shape
    given = len(start) + PREFIX
    if length <= given:
        raise SourceError(
            f"windows of {length} tokens leave nothing to write after the first {given}",
            remedy=f"use a sequence length above {given}, or no generated windows",
        )
    text = without_start(windows, start)
    heads = torch.tensor(start, dtype=windows.dtype).expand(AT_ONCE, -1)
    written = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, count, AT_ONCE):
            rows = torch.arange(first, min(first + AT_ONCE, count)) % samples
            places = torch.randint(0, text.shape[1] - PREFIX, (len(rows), 1))
            words = text[rows[:, None], places + torch.arange(PREFIX)]
            beginnings = torch.cat([heads[: len(rows)], words], dim=1)
            written.append(continued(model, beginnings, length, start, tell).cpu())
    return torch.cat(written) if written else windows[:0]


def continued(
    model: Any, beginnings: Tensor, length: int, start: Sequence[int], tell: Callable[[], None]
) -> Tensor:
    """Go on from [windows, given] tokens to [windows, length].

    Token by token, the beginning as well: what one token of every window needs is all the memory
    it takes beside the cache. The model's own generation configuration has no say.
    """
    rows, given = beginnings.shape
    tokens = beginnings.new_empty(rows, length)
    tokens[:, :given] = beginnings
    cache = roomy_cache(model.config, length)
    # transformers 5.24 gave the argument, and the field of the output, another name
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    ends = model.config.get_text_config(decoder=True).eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    never = torch.tensor([*ends, *start], dtype=torch.int64)
    for place in range(length - 1):
        seen = tokens[:, place : place + 1].to(model.device)
        with OneTokenAttention():
            output = model(input_ids=seen, use_cache=True, **{name: cache})
        if getattr(output, name, None) is not cache:
            raise SourceError(
                f"{type(model).__name__} does not go on from keys and values that it is given",
                remedy="leave the generated windows out (--generated-windows 0)",
            )
        if place + 1 >= given:
            logits = output.logits[:, -1]
            logits[:, never.to(logits.device)] = -torch.inf  # no window ends early, or begins again
            tokens[:, place + 1] = drawn(logits).to(tokens.device)
            tell()
    return tokens


def drawn(logits: Tensor) -> Tensor:
    """One token of softmax(logits) for each row [windows, vocab]: where a uniform number falls.

    `torch.multinomial` draws a number for every token of the vocabulary and takes as long for
    that as a small model for its forward. Here chances are right to within 2⁻²⁴.
    """
    sums = torch.softmax(logits, dim=1, dtype=torch.float32).cumsum(1)
    uniform = torch.rand(len(logits), 1).to(sums.device)
    found = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
    return found[:, 0].clamp_(max=logits.shape[1] - 1)
