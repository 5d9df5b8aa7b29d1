"""Documents → token windows, the unit in which a model is calibrated."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.documents import read_documents
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.tokenizer import Tokenizer, token_ids
from secateur.registry import did_you_mean
from secateur.types import Windows

__all__ = ["WindowPlan", "load_calibration", "load_windows", "make_windows", "save_windows"]

PACKINGS = ("concatenate", "random-crop")
PIECE_CHARACTERS = 65_536
PIECES_AT_ONCE = 32
MAX_MISSES = 20_000


@dataclass(frozen=True)
class WindowPlan:
    """How many windows are cut from a text, how long, and how.

    Args:
        samples: number of windows.
        sequence_length: tokens in each.
        seed: of the draw.
        packing: `concatenate` cuts windows from a stream of shuffled documents and wastes no text;
            `random-crop` takes one window from a random place of a random document that is longer
            than a window, as the published code of Wanda does.

    Raises:
        RecipeError: a number is below one, or the packing is unknown.
    """

    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    packing: str = "concatenate"

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length"):
            if getattr(self, name) < 1:
                raise RecipeError(
                    f"{name} is {getattr(self, name)}", remedy=f"give a {name} of 1 or more"
                )
        if self.packing not in PACKINGS:
            raise RecipeError(
                f"unknown packing {self.packing!r}", remedy=did_you_mean(self.packing, [*PACKINGS])
            )


def make_windows(documents: Sequence[str], tokenizer: Tokenizer, plan: WindowPlan) -> Windows:
    """Cut calibration windows from documents.

    `concatenate` shuffles the documents with the seed, puts the end-of-sequence token between
    them, cuts the stream into windows that do not overlap, and draws `samples` of these. A start
    token stays at the head of each document if the tokenizer puts one there. Documents above
    65 536 characters are first cut into pieces at line ends, so that one long file is sampled
    all over.

    `random-crop` draws documents and places with the same calls to `random` as the published
    code, and so gives its windows for the same seed, documents and tokenizer.

    Returns:
        Token ids [samples, sequence_length], int64.

    Raises:
        SourceError: there is not enough text for the windows asked.
    """
    cut = crop_windows if plan.packing == "random-crop" else pack_windows
    windows = cut(documents, tokenizer, plan)
    if len(windows) < plan.samples:
        fits = f"; there is enough for --samples {len(windows)}" if windows else ""
        raise SourceError(
            f"the text gives {len(windows)} windows of {plan.sequence_length} tokens, "
            f"{plan.samples} were asked",
            where=f"{len(documents)} documents, packing {plan.packing}",
            remedy="name a longer text, or ask for fewer samples or a shorter sequence length"
            + fits,
        )
    return torch.tensor(windows, dtype=torch.int64)


def pack_windows(
    documents: Sequence[str], tokenizer: Tokenizer, plan: WindowPlan
) -> list[list[int]]:
    """Windows cut one after the other from the stream of shuffled documents."""
    rng = random.Random(plan.seed)
    pieces = cut_pieces(documents, max(PIECE_CHARACTERS, 16 * plan.sequence_length))
    rng.shuffle(pieces)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for first in range(0, len(pieces), PIECES_AT_ONCE):
        texts = [documents[i][a:b] for i, a, b in pieces[first : first + PIECES_AT_ONCE]]
        for ids in token_ids(tokenizer, texts):
            stream.extend(ids)
            if end is not None and ids and ids[-1] != end:
                stream.append(end)
        if len(stream) >= plan.samples * plan.sequence_length:
            break
    length = plan.sequence_length
    starts = list(range(0, len(stream) - length + 1, length))
    rng.shuffle(starts)
    return [stream[start : start + length] for start in starts[: plan.samples]]


def cut_pieces(documents: Sequence[str], limit: int) -> list[tuple[int, int, int]]:
    """Document, start and end of each piece of at most `limit` characters; blank ones are left out.

    A piece ends after a line if it can, else after a space, else in the middle of a word.
    """
    pieces = []
    for number, text in enumerate(documents):
        start = 0
        while start < len(text):
            end = min(start + limit, len(text))
            if end < len(text):
                end = (text.rfind("\n", start, end) + 1) or (text.rfind(" ", start, end) + 1) or end
            if text[start:end].strip():
                pieces.append((number, start, end))
            start = end
    return pieces


def crop_windows(
    documents: Sequence[str], tokenizer: Tokenizer, plan: WindowPlan
) -> list[list[int]]:
    """One window from a random place of each of `samples` random long documents."""
    rng = random.Random(plan.seed)
    length = plan.sequence_length
    too_short: set[int] = set()
    windows: list[list[int]] = []
    misses = 0
    while documents and len(windows) < plan.samples and misses < MAX_MISSES:
        number = rng.randint(0, len(documents) - 1)
        ids = [] if number in too_short else token_ids(tokenizer, [documents[number]])[0]
        if len(ids) <= length:
            too_short.add(number)
            misses += 1
            continue
        # the published code never starts at the very last place; neither does this
        start = rng.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
        misses = 0
    return windows


def load_calibration(
    source: str,
    tokenizer: Tokenizer | None,
    plan: WindowPlan,
    *,
    vocab_size: int,
    field: str = "text",
    split: str | None = None,
    config: str | None = None,
) -> tuple[Windows, dict[str, Any]]:
    """Calibration windows from a text source or a file of ready windows, and where they are from.

    Args:
        source: what `read_documents` takes, or a `.safetensors` file of windows. All windows of
            such a file are used as they are: the file decides their number and length.
        tokenizer: of the model that will read the windows; None will do for ready windows.
        plan: how windows are cut from a text.
        vocab_size: of the model; no token may lie beyond it.
        field: as in `read_documents`.
        split: as in `read_documents`.
        config: as in `read_documents`.

    Returns:
        The windows [samples, sequence_length], and a record of JSON values: the source, the plan,
        and the SHA-256 of the windows, by which two runs can be seen to have used the same.

    Raises:
        SourceError: the source cannot be had, has too little text, or gives tokens that are not in
            the model's vocabulary.
        RecipeError: the source is a text and there is no tokenizer.
    """
    record: dict[str, Any] = {"source": source}
    if source.endswith(".safetensors"):
        windows = load_windows(Path(source).expanduser(), vocab_size=vocab_size)
    else:
        if tokenizer is None:
            raise RecipeError(
                "a text cannot be calibrated on without a tokenizer",
                where=source,
                remedy="give the tokenizer, or token windows [samples, sequence_length] or a "
                ".safetensors file of them",
            )
        documents = read_documents(source, field=field, split=split, config=config)
        windows = make_windows(documents, tokenizer, plan)
        check_range(windows, vocab_size, source)
        record |= {"documents": len(documents), **asdict(plan)}
    record |= {
        "samples": windows.shape[0],
        "sequence_length": windows.shape[1],
        "tokens": windows.numel(),
        "vocabulary": vocab_size,
        "sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
    return windows, record


def load_windows(path: Path, *, vocab_size: int | None = None) -> Windows:
    """Windows from a safetensors file with one tensor `input_ids` [samples, sequence_length].

    Args:
        path: the file.
        vocab_size: token ids must be below it.

    Raises:
        SourceError: there is no such file, or it holds no windows of this vocabulary.
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise SourceError("no such file of windows", where=str(path), remedy="check the path")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"not a whole safetensors file: {error}", where=str(path), remedy="write it again"
        ) from error
    remedy = "write it with save_windows: int64 input_ids [samples, sequence_length]"
    if "input_ids" not in tensors:
        raise SourceError(
            f"no tensor 'input_ids'; the file has: {', '.join(tensors) or 'none'}",
            where=str(path),
            remedy=remedy,
        )
    ids = tensors["input_ids"]
    if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2 or ids.numel() == 0:
        raise SourceError(
            f"input_ids is {ids.dtype} of shape {tuple(ids.shape)}, not windows of token ids",
            where=str(path),
            remedy=remedy,
        )
    check_range(ids, vocab_size, str(path))
    return ids.to(torch.int64)


def check_range(ids: Tensor, vocab_size: int | None, where: str) -> None:
    """Check that token ids are in a vocabulary; None if only its lower end is known."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        raise SourceError(
            f"token ids from {lowest} to {highest}, the vocabulary has {vocab_size or 'any'}",
            where=where,
            remedy="make the windows with the tokenizer of this model",
        )


def save_windows(
    windows: Windows, path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write windows to a safetensors file that `load_windows` reads, in one step.

    Args:
        windows: token ids [samples, sequence_length].
        path: the file; its folder must be there.
        metadata: text kept in the header of the file.
    """
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({"input_ids": windows.contiguous()}, partial, metadata=dict(metadata or {}))
    os.replace(partial, path)
