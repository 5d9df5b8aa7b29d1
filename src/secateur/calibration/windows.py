"""Makes token windows from documents, checks, stores and loads them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.beside import refuse_beside
from secateur.calibration.cutting import WindowCutter
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.tokenizer import Tokenizer
from secateur.registry import did_you_mean
from secateur.runs.atomic import write_bytes
from secateur.types import Windows

PACKINGS = ("concatenate", "random-crop")
PIECE_CHARACTERS = 65_536
PIECES_AT_ONCE = 32
MAX_MISSES = 20_000
START = "start_tokens"
"""The key of the start tokens in records and in the headers of window files."""

EXTRA = "extra_windows"
"""The key of the number of extra windows in records and in the headers of window files."""


@dataclass(frozen=True)
class WindowPlan:
    """How many windows are cut from a text, how long, and how.

    Args:
        windows: number of windows.
        sequence_length: tokens in each, start tokens among them.
        seed: of the draw.
        packing: `concatenate` cuts windows from a stream of shuffled documents and wastes no text;
            `random-crop` takes one window from a random place of a random document that is longer
            than a window, as the published code of Wanda does.
        extra: number of windows after these that only a distillation reads; fewer where the text
            has no more.

    Raises:
        RecipeError: a number is below one, or the packing is unknown.
    """

    windows: int = 128
    sequence_length: int = 2048
    seed: int = 0
    packing: str = "concatenate"
    extra: int = 0

    @property
    def all_windows(self) -> int:
        """Number of windows with the extra ones."""
        return self.windows + self.extra

    def __post_init__(self) -> None:
        for name in ("windows", "sequence_length"):
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

    Each window begins with the start tokens of the tokenizer, if it has any; see `cutting`.

    `concatenate` shuffles the documents with the seed, puts the end-of-sequence token between
    them, cuts the stream into windows that do not overlap, and draws `samples` of these. Documents
    above 65 536 characters are first cut into pieces at line ends, so that one long file is
    sampled all over.

    `random-crop` draws documents and places with the same calls to `random` as the published code.
    So it gives the same windows for the same seed, documents and tokenizer; a start token, if there
    is one, replaces the first token of each. It draws long documents, and some of them again; so
    the extra windows come from all other documents, as `concatenate` cuts them.

    Returns:
        Token ids [samples, sequence_length], int64, with the extra windows at the end.

    Raises:
        SourceError: the text is too short for so many windows, without the extra ones.
        RecipeError: the start tokens leave no room for text.
    """
    if plan.packing == "random-crop":
        windows = crop_windows(documents, tokenizer, plan)
    else:
        windows = pack_windows(documents, tokenizer, plan, plan.all_windows)
    if len(windows) < plan.windows:
        fits = f"; there is enough for --windows {len(windows)}" if len(windows) else ""
        raise SourceError(
            f"the text gives {len(windows)} windows of {plan.sequence_length} tokens, "
            f"{plan.windows} are needed",
            where=f"{len(documents)} documents, packing {plan.packing}",
            remedy="name a longer text, or ask for fewer windows or a shorter sequence length"
            + fits,
        )
    return windows


def pack_windows(
    documents: Sequence[str], tokenizer: Tokenizer, plan: WindowPlan, count: int
) -> Windows:
    """At most `count` windows, one after the other from the stream of shuffled documents."""
    cutter = WindowCutter.of(tokenizer, plan.sequence_length)
    rng = random.Random(plan.seed)
    pieces = cut_pieces(documents, max(PIECE_CHARACTERS, 16 * plan.sequence_length))
    rng.shuffle(pieces)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for first in range(0, len(pieces), PIECES_AT_ONCE):
        texts = [documents[i][a:b] for i, a, b in pieces[first : first + PIECES_AT_ONCE]]
        for ids in cutter.read(texts):
            stream.extend(ids)
            if end is not None and ids and ids[-1] != end:
                stream.append(end)
        if len(stream) >= count * cutter.text_length:
            break
    places = cutter.places(len(stream))
    rng.shuffle(places)
    return cutter.cut(stream, places[:count])


def cut_pieces(documents: Sequence[str], limit: int) -> list[tuple[int, int, int]]:
    """Document, start and end of each piece of at most `limit` characters, without blank pieces.

    A piece ends after a line if possible, otherwise after a space, otherwise within a word.
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


def crop_windows(documents: Sequence[str], tokenizer: Tokenizer, plan: WindowPlan) -> Windows:
    """One window from a random place of each of some random long documents, and the extra ones."""
    cutter = WindowCutter.of(tokenizer, plan.sequence_length)
    rng = random.Random(plan.seed)
    length = cutter.text_length
    too_short: set[int] = set()
    read: set[int] = set()
    windows: list[Windows] = []
    misses = 0
    while documents and len(windows) < plan.windows and misses < MAX_MISSES:
        number = rng.randint(0, len(documents) - 1)
        ids = [] if number in too_short else cutter.read([documents[number]])[0]
        if len(ids) <= length:
            too_short.add(number)
            misses += 1
            continue
        # like the published code, never start at the very last place
        windows.append(cutter.cut(ids, [rng.randint(0, len(ids) - length - 1)]))
        read.add(number)
        misses = 0
    if plan.extra and len(windows) == plan.windows:
        others = [text for number, text in enumerate(documents) if number not in read]
        windows.append(pack_windows(others, tokenizer, plan, plan.extra))
    return torch.cat(windows) if windows else cutter.cut([], [])


def load_windows(
    path: Path,
    *,
    vocab_size: int | None = None,
    positions: int | None = None,
    pictures: bool = False,
) -> Windows:
    """Windows from a safetensors file with a tensor `input_ids` [samples, sequence_length].

    Args:
        path: the file.
        vocab_size: token ids must be below it.
        positions: windows must not be longer.
        pictures: whether the caller reads what the file has beside the tokens (`load_beside`).

    Raises:
        SourceError: there is no such file, or it contains no windows of this vocabulary.
        RecipeError: the windows are longer than the model reads.
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
    if "input_ids" not in tensors:
        raise SourceError(
            f"no tensor 'input_ids'; the file has: {', '.join(tensors) or 'none'}",
            where=str(path),
            remedy="write it with save_windows: int64 input_ids [samples, sequence_length]",
        )
    if not pictures:
        refuse_beside(tensors, path)
    ids = tensors["input_ids"]
    check_fit(ids, str(path), vocab_size=vocab_size, positions=positions)
    return ids.to(torch.int64)


def stored_start(path: Path) -> tuple[int, ...]:
    """The start tokens in the header of a window file; none if it has no such entry.

    Args:
        path: a file that `load_windows` has read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = (file.metadata() or {}).get(START, "[]")
    return tuple(json.loads(entry))


def stored_extra(path: Path) -> int:
    """The number of extra windows at the end of a window file, from its header.

    Args:
        path: a file that `load_windows` has read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return int((file.metadata() or {}).get(EXTRA, 0))


def check_fit(ids: Tensor, where: str, *, vocab_size: int | None, positions: int | None) -> None:
    """Check that there are windows and that a model can read them, before anything runs.

    Args:
        ids: token ids [windows, sequence_length].
        where: the source of the windows, for the message.
        vocab_size: of the model; None if only its lower end is known.
        positions: how many tokens the model reads at once; None if it does not say.

    Raises:
        SourceError: this is no matrix of token ids, or a token is not in the vocabulary.
        RecipeError: the windows are longer than the model reads.
    """
    if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2 or ids.numel() == 0:
        raise SourceError(
            f"{ids.dtype} of shape {tuple(ids.shape)} is not windows of token ids",
            where=where,
            remedy="give int64 token ids [samples, sequence_length], at least one",
        )
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        raise SourceError(
            f"token ids from {lowest} to {highest}, but the vocabulary has {vocab_size or 'any'}",
            where=where,
            remedy="make the windows with the tokenizer of this model",
        )
    if positions is not None and ids.shape[1] > positions:
        raise RecipeError(
            f"windows have {ids.shape[1]} tokens, but the model reads {positions} at once",
            where=where,
            remedy=f"make windows of {positions} tokens or less",
        )


def save_windows(
    windows: Windows,
    path: Path,
    *,
    start: Sequence[int] = (),
    extra: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write windows to a safetensors file that `load_windows` reads, in one step.

    Args:
        windows: token ids [samples, sequence_length].
        path: the file; its folder must exist.
        start: the tokenizer's start tokens, with which each window begins; the header of the file
            stores them as `start_tokens`.
        extra: how many of the windows, at the end, only a distillation reads.
        metadata: text for the header of the file.
    """
    from safetensors.torch import save

    entry = {START: json.dumps(list(start))} if start else {}
    entry |= {EXTRA: str(extra)} if extra else {}
    write_bytes(path, save({"input_ids": windows.contiguous()}, {**(metadata or {}), **entry}))
