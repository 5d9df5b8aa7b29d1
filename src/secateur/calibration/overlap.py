"""Checks whether a model was trained on its evaluation text, by shared sequences of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.types import Windows

SEQUENCE = 32
"""So many tokens in a row two texts do not share by chance."""
MULTIPLIER = 6_364_136_223_846_793_005


def shared_share(
    training: Windows, judged: Int64[Tensor, "windows length"], length: int = SEQUENCE
) -> float:
    """The fraction of sequences of `length` tokens in `judged` that also occur in `training`.

    Sequences are compared by 64-bit hashes; sequences across the edge of a window do not count.
    Memory: 8 bytes for each token of the training text.

    Args:
        training: token ids [samples, sequence_length].
        judged: token ids [windows, sequence_length], of the same tokenizer.
        length: of the sequences; at most the shorter window.

    Example:
        >>> import torch
        >>> from secateur.calibration.overlap import shared_share
        >>> training = torch.tensor([[1, 2, 3, 4, 5]])
        >>> shared_share(training, torch.tensor([[9, 2, 3, 4, 9]]), length=2)
        0.5
    """
    length = min(length, training.shape[1], judged.shape[1])
    known = hashes(training, length).unique()
    sought = hashes(judged, length)
    return float(torch.isin(sought, known).float().mean())


def hashes(windows: Windows, length: int) -> Tensor:
    """A hash of every sequence, int64 [sequences]; sums and products wrap around."""
    count = windows.shape[1] - length + 1
    found = torch.zeros(len(windows), count, dtype=torch.int64)
    for place in range(length):
        found.mul_(MULTIPLIER).add_(windows[:, place : place + count] + 1)
    return found.flatten()
