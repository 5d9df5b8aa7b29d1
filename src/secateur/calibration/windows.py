"""Makes token windows from documents, checks, stores and loads them.

Calibration, training and evaluation cut texts in the same way. Where the tokenizer puts start
tokens in front of a text, every window begins with them. A model trained with start tokens fails
without them, because its attention rests on the first token. So a window of S tokens is

    start tokens (k of them) + S − k tokens of text

and windows that do not overlap take S − k tokens of text each: no token is lost between two of
them, and none is read twice. Only windows have start tokens; the text itself has none. An end token
that a tokenizer appends to a text belongs to the text. Where the tokenizer puts no start token, k
is 0 and a window is S tokens of text.

A conversation is written by the chat template of the tokenizer. Its start token is cut off as that
of a text, and no end token is put behind it, because the template writes its own.

Evaluation predicts no start token. Training and gradients do not predict the first token of a
window. For k ≤ 1 this is the same; of two start tokens they predict the second.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.calibration.chats import Document, holds_chats
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.tokenizer import Tokenizer, start_tokens, text_tokens
from secateur.runs.output import write_bytes
from secateur.types import Windows

PIECE_CHARACTERS = 65_536
_PIECES_AT_ONCE = 32
_MAX_MISSES = 20_000
START = "start_tokens"
"""The key of the start tokens in records and in the headers of window files."""

EXTRA = "extra_windows"
"""The key of the number of extra windows in records and in the headers of window files."""

SOURCE = "source"
"""The key of the text in records and in the headers of window files."""


def window_length(asked: int | None, usual: int, positions: int | None) -> int:
    """How many tokens a window has: as asked, or the usual number if a model has the positions.

    Raises:
        RecipeError: the model has fewer positions.
    """
    longest = positions or usual
    length = asked or min(usual, longest)
    if length > longest:
        raise RecipeError(
            f"sequence length {length} exceeds the model's {longest} positions",
            where="--sequence-length",
            remedy=f"use --sequence-length {longest} or less",
        )
    return length


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


def make_windows(documents: Sequence[Document], tokenizer: Tokenizer, plan: WindowPlan) -> Windows:
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
        windows = _crop_windows(documents, tokenizer, plan)
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
    documents: Sequence[Document], tokenizer: Tokenizer, plan: WindowPlan, count: int
) -> Windows:
    """At most `count` windows, one after the other from the stream of shuffled documents."""
    return pack_with_answers(documents, tokenizer, plan, count, answers=False)[0]


def pack_with_answers(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    plan: WindowPlan,
    count: int,
    *,
    answers: bool = True,
) -> tuple[Windows, Tensor | None]:
    """The windows of `pack_windows`, and which of their tokens are answers.

    Args:
        documents: texts or conversations.
        tokenizer: used with its default special tokens, and its chat template.
        plan: the length of windows, and the seed.
        count: the most windows.
        answers: whether to mark the answers of conversations.

    Returns:
        Windows and a mask of their shape; None without conversations.
    """
    cutter = _WindowCutter.of(tokenizer, plan.sequence_length)
    answers = answers and holds_chats(documents)
    rng = random.Random(plan.seed)
    # a piece has several windows: about four characters make a token
    pieces = cut_pieces(documents, max(PIECE_CHARACTERS, 16 * plan.sequence_length))
    rng.shuffle(pieces)
    stream = _Stream(cutter, answers)
    for first in range(0, len(pieces), _PIECES_AT_ONCE):
        some = pieces[first : first + _PIECES_AT_ONCE]
        stream.add(
            [
                document[a:b] if isinstance(document := documents[i], str) else document
                for i, a, b in some
            ]
        )
        if len(stream.ids) >= count * cutter.text_length:
            break  # the rest of the text would only be tokenised in vain
    places = cutter.places(len(stream.ids))
    rng.shuffle(places)
    return stream.cut(places[:count])


class _Stream:
    """The tokens of documents, one after the other, and which of them are answers if asked."""

    def __init__(self, cutter: _WindowCutter, answers: bool) -> None:
        self.cutter, self.answers = cutter, answers
        self.ids: list[int] = []
        self.marks: list[bool] = []

    def add(self, documents: Sequence[Document]) -> None:
        """Add documents, with an end token behind each that has none and is no conversation."""
        end = self.cutter.tokenizer.eos_token_id
        if self.answers:
            found = [self.cutter.marked(document) for document in documents]
        else:
            found = [(ids, []) for ids in self.cutter.read(documents)]
        for document, (ids, marks) in zip(documents, found, strict=True):
            self.ids += ids
            self.marks += marks
            ends_itself = not isinstance(document, str) and document.ends_itself
            if end is not None and ids and ids[-1] != end and not ends_itself:
                self.ids.append(end)
                self.marks += [True] * self.answers

    def cut(self, places: Sequence[int]) -> tuple[Windows, Tensor | None]:
        """The windows at these places, and which of their tokens are answers."""
        windows = self.cutter.cut(self.ids, places)
        if not self.answers:
            return windows, None
        # Start tokens are never answers: the same cut, with False in their places.
        nothing = replace(self.cutter, start=(0,) * len(self.cutter.start))
        return windows, nothing.cut(self.marks, places).bool()


def cut_pieces(documents: Sequence[Document], limit: int) -> list[tuple[int, int, int]]:
    """Document, start and end of each piece of at most `limit` characters, without blank pieces.

    A piece ends after a line if possible, otherwise after a space, otherwise within a word. A
    conversation is one piece.
    """
    if holds_chats(documents):
        return [(number, 0, 0) for number in range(len(documents))]
    pieces = []
    for number, text in enumerate(cast("Sequence[str]", documents)):
        start = 0
        while start < len(text):
            end = min(start + limit, len(text))
            if end < len(text):
                end = (text.rfind("\n", start, end) + 1) or (text.rfind(" ", start, end) + 1) or end
            if text[start:end].strip():
                pieces.append((number, start, end))
            start = end
    return pieces


def _crop_windows(documents: Sequence[Document], tokenizer: Tokenizer, plan: WindowPlan) -> Windows:
    """One window from a random place of each of some random long documents, and the extra ones."""
    cutter = _WindowCutter.of(tokenizer, plan.sequence_length)
    rng = random.Random(plan.seed)
    length = cutter.text_length
    too_short: set[int] = set()
    read: set[int] = set()
    windows: list[Windows] = []
    misses = 0
    while documents and len(windows) < plan.windows and misses < _MAX_MISSES:
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
    path: Path, *, vocab_size: int | None = None, positions: int | None = None
) -> Windows:
    """Windows from a safetensors file with a tensor `input_ids` [samples, sequence_length].

    Args:
        path: the file.
        vocab_size: token ids must be below it.
        positions: windows must not be longer.

    Raises:
        SourceError: there is no such file, or it contains no windows of this vocabulary.
        RecipeError: the windows are longer than the model reads.
        CheckpointError: the file is damaged.
    """
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
    more = sorted(tensors.keys() - {"input_ids", "attention_mask"})
    if more:
        raise SourceError(
            f"the windows have {', '.join(more)} beside their tokens",
            where=str(path),
            remedy="use windows of text, a file with input_ids alone",
        )
    ids = tensors["input_ids"]
    check_fit(ids, str(path), vocab_size=vocab_size, positions=positions)
    return ids.to(torch.int64, copy=True)  # the file must not stay mapped: Windows keeps it then


def stored_start(path: Path) -> tuple[int, ...]:
    """The start tokens in the header of a window file; none if it has no such entry.

    Args:
        path: a file that `load_windows` has read.
    """
    return tuple(json.loads(window_header(path).get(START, "[]")))


def stored_extra(path: Path) -> int:
    """The number of extra windows at the end of a window file, from its header.

    Args:
        path: a file that `load_windows` has read.
    """
    return int(window_header(path).get(EXTRA, 0))


def window_header(path: Path) -> dict[str, str]:
    """The start tokens, extra windows and source of a window file, as far as it names them."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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
    entry = {START: json.dumps(list(start))} if start else {}
    entry |= {EXTRA: str(extra)} if extra else {}
    write_bytes(path, save({"input_ids": windows.contiguous()}, {**(metadata or {}), **entry}))


@dataclass(frozen=True)
class _WindowCutter:
    """Cuts windows of one length from the text of one tokenizer.

    Attributes:
        tokenizer: used with its default special tokens.
        start: the tokens that each window begins with.
        sequence_length: tokens in a window, the start tokens among them.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    sequence_length: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int) -> _WindowCutter:
        """A cutter for a tokenizer; encoding a text shows the start tokens.

        Raises:
            RecipeError: the start tokens leave no room for text.
        """
        start = start_tokens(tokenizer)
        if sequence_length <= len(start):
            raise RecipeError(
                f"windows of {sequence_length} tokens have no room for text: the tokenizer puts "
                f"{len(start)} in front of each",
                remedy=f"use a sequence length above {len(start)}",
            )
        return cls(tokenizer, start, sequence_length)

    @property
    def text_length(self) -> int:
        """Tokens of text in a window."""
        return self.sequence_length - len(self.start)

    def read(self, texts: Sequence[Document]) -> list[list[int]]:
        """The token ids of each text, without start tokens."""
        return text_tokens(self.tokenizer, texts, self.start)

    def marked(self, document: Document) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation without start tokens, and which of them are answers."""
        if isinstance(document, str):
            ids = self.read([document])[0]
            return ids, [True] * len(ids)
        ids, marks = document.marked(self.tokenizer)
        count = len(self.start) * (tuple(ids[: len(self.start)]) == self.start)
        return ids[count:], marks[count:]

    def places(self, tokens: int) -> list[int]:
        """The starts of windows that do not overlap, in a text of so many tokens."""
        return list(range(0, tokens - self.text_length + 1, self.text_length))

    def cut(self, stream: Sequence[int], places: Sequence[int]) -> Windows:
        """The windows whose text begins at these places of a stream of token ids.

        Returns:
            Token ids [places, sequence_length], int64.
        """
        length = self.text_length
        rows = [[*self.start, *stream[place : place + length]] for place in places]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.sequence_length)


def evaluation_windows(
    text: str | Sequence[Document],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    max_windows: int | None = None,
) -> Windows:
    """Cut a text into windows that do not overlap; the last partial one is dropped.

    Args:
        text: the whole text, tokenised once; or conversations, one after the other.
        tokenizer: used with its default special tokens.
        sequence_length: tokens in a window, at least 2, including start tokens.
        max_windows: use only this many windows, from the start; all by default.

    Returns:
        Token ids [windows, sequence_length], int64.

    Raises:
        RecipeError: the sequence length is below 2, or the start tokens leave no room for text.
        SourceError: the text is shorter than one window.
    """
    return evaluation_with_answers(
        text, tokenizer, sequence_length, max_windows=max_windows, answers=False
    )[0]


def evaluation_with_answers(
    text: str | Sequence[Document],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    max_windows: int | None = None,
    answers: bool = True,
) -> tuple[Windows, Tensor | None]:
    """The windows of `evaluation_windows`, and which of their tokens are answers.

    The arguments and the result are as in `pack_with_answers`.
    """
    if sequence_length < 2 or (max_windows is not None and max_windows < 1):
        raise RecipeError(
            f"sequence_length {sequence_length}, windows {max_windows}: nothing to predict",
            remedy="give a sequence_length of 2 or more and at least one window",
        )
    cutter = _WindowCutter.of(tokenizer, sequence_length)
    if isinstance(text, str):
        stream = _Stream(cutter, answers=False)
        stream.ids = cutter.read([text])[0]
    else:
        stream = _Stream(cutter, answers)
        for document in text:
            stream.add([document])
            if max_windows is not None and len(stream.ids) >= max_windows * cutter.text_length:
                break
    places = cutter.places(len(stream.ids))
    if not places:
        raise SourceError(
            f"the text has {len(stream.ids)} tokens, one window needs {cutter.text_length}",
            remedy="name a longer text or a shorter sequence length",
        )
    return stream.cut(places[:max_windows])


def begins_with(windows: Windows, start: Sequence[int]) -> bool:
    """Whether every window begins with these tokens; True for no tokens.

    Example:
        >>> import torch
        >>> from secateur.calibration.windows import begins_with
        >>> begins_with(torch.tensor([[1, 5, 6], [1, 7, 8]]), [1])
        True
    """
    head = torch.tensor(start, dtype=windows.dtype)
    return len(start) < windows.shape[1] and bool((windows[:, : len(start)] == head).all())


def without_start(windows: Windows, start: Sequence[int]) -> Tensor:
    """The text of windows, [windows, text]: without start tokens, if all windows have them."""
    return windows[:, len(start) :] if begins_with(windows, start) else windows


def shares(count: int, weights: tuple[float, ...]) -> list[int]:
    """Divide a number of windows by weights; the largest remainders get the rest.

    Example:
        >>> from secateur.calibration.windows import shares
        >>> shares(10, (2.0, 1.0, 1.0))
        [5, 3, 2]
    """
    exact = [count * weight / sum(weights) for weight in weights]
    found = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])  # largest remainder first
    for i in order[: count - sum(found)]:
        found[i] += 1
    return found
