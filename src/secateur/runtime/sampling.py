"""From logits to text, for `generate`, `chat` and `serve` alike.

Options that are not given come from the model's `generation_config.json`. Text grows by whole
characters only, and never by a part of a stop text.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from secateur.errors import CheckpointError, KernelError, NumericalError, RecipeError
from secateur.models.tokenizer import Tokenizer
from secateur.recipes.deploy import Sampling
from secateur.runtime.grammar import Grammar
from secateur.runtime.kernels.library import CChances, kernel_info
from secateur.runtime.kernels.matrix import kernels

Numbers = NDArray[Any]
"""Logits or probabilities, float32 [vocabulary], or ids of tokens."""

FIRST_LOOK = 1e-4
"""Tokens of less than this part of the largest probability are seldom needed, and sorting all of
them takes long."""

BLOCK = 512
"""Tokens of which one is drawn when their block has been, `SCT_BLOCK` in csrc/secateur.h."""


POINTS = 64
"""Random numbers that are made at once: a call of torch takes as long as drawing a token."""


class Chances:
    """The probabilities of a token, computed by the kernels where they are needed (csrc/sample.c).

    They are softmax(logits / temperature) over the tokens that top-k, top-p and min-p keep.

    Args:
        draws: has the options, and gives random numbers.
        logits: float32, with penalties. They are read later too, so they must not change.
        ids: the token of each logit, int64, ascending; None where they are the same.

    Attributes:
        token: the most likely one.
        sure: its probability; at temperature 0 that of temperature 1.

    Raises:
        NumericalError: a logit is not a number, or no token can follow.
        KernelError: memory ran out, or there are no kernels.
    """

    def __init__(self, draws: Draws, logits: Numbers, ids: Numbers | None = None) -> None:
        count, cuts = len(logits), draws.cuts and draws.temperature > 0
        self.draws, sums = draws, (ctypes.c_double * -(-count // BLOCK))()
        self.memory = logits, ids, sums, (ctypes.c_int64 * count)() if cuts else None
        # numpy's own ways to an address take longer than the softmax
        places = [x and ctypes.addressof(x) for x in self.memory[2:]]
        self.c = CChances(
            *(_address(logits), count, None if ids is None else _address(ids)),
            *(draws.temperature or 1.0, draws.top_p, draws.min_p, draws.top_k or 0, *places),
        )
        self.given = ctypes.byref(self.c)
        failed = kernels().sct_weigh(self.given)
        if failed == -2:
            raise NumericalError("the logits of the next token are not numbers, or all are -inf")
        if failed:
            raise KernelError("no token could be drawn: memory ran out")
        self.token = self.c.best if ids is None else int(ids[self.c.best])
        self.sure = 1 / self.c.total

    def of(self, token: int) -> float:
        """The probability of a token."""
        return float(kernels().sct_chance(self.given, token))

    def draw(self, less: Chances | None = None) -> int:
        """A token by its probability, or by the positive part of the probabilities − `less`."""
        # without cuts one number chooses a block of tokens, and one a token of the block
        block = 0.0 if self.c.keeps else self.draws.point()
        other = None if less is None else less.given
        return int(kernels().sct_draw(self.given, other, block, self.draws.point()))


def _address(numbers: Any) -> int:
    """Where an array begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(numbers))


class Draws:
    """Draws the tokens of one text, and remembers them for the penalties.

    Temperature, top-k, top-p and min-p sampling, and penalties for tokens that occurred.

    Penalties come first. The repetition penalty r divides the positive logits of all tokens of
    prompt and text by r, and multiplies the negative ones (Keskar et al., CTRL, arXiv 1909.05858).
    The presence penalty is subtracted from the logits of tokens of the text, and the frequency
    penalty once for each time that they occurred (OpenAI's API).

    Temperature 0 takes the most likely token. Above 0 the probabilities are softmax(logits / T).
    Top-k keeps the k most likely tokens. Top-p then keeps the fewest of the most likely tokens
    whose probabilities sum to at least p (Holtzman et al., The Curious Case of Neural Text
    Degeneration, ICLR 2020, arXiv 1904.09751). Min-p keeps tokens of at least p times the largest
    probability (Nguyen et al., Turning Up the Heat, ICLR 2025, arXiv 2407.01082). The rest is never
    drawn.

    The kernels draw a token (`Chances`). Without kernels all arithmetic is numpy's: the threads of
    torch's, which begin at 32,768 numbers, would wait busily. But for rounding both draw the same.

    Args:
        sampling: how tokens are drawn. What is None changes nothing, and neither does `top_k` 0.
        prompt: the tokens before the text, which the repetition penalty counts.
        grammar: what the text follows; None: anything.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int] = (), grammar: Grammar | None = None
    ) -> None:
        self.sampling, self.grammar = sampling, grammar
        self.temperature, self.top_k = sampling.temperature or 0.0, sampling.top_k or None
        self.top_p, self.min_p = sampling.top_p or 1.0, sampling.min_p or 0.0
        self.repetition_penalty = sampling.repetition_penalty or 1.0
        self.cuts = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        self.by_kernels = kernel_info().tier != "none"
        self.points = list[float]()
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.text, self.known = list[int](), {*prompt}
        self.seen = sorted(self.known)

    def draw(self, logits: Float[Tensor, " vocabulary"]) -> int:
        """The next token.

        Args:
            logits: float32, of all tokens.

        Raises:
            GrammarError: no token can follow.
        """
        found = self.penalised(logits.numpy())
        token = int(found.argmax()) if self.temperature == 0 else self.chosen(found)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """Append a token to the text."""
        if self.grammar is not None:
            self.grammar.note(token)
        if token not in self.known:
            self.known.add(token)
            self.seen.append(token)
        self.text.append(token)

    @property
    def penalises(self) -> bool:
        """Whether `penalised` changes anything."""
        s = self.sampling
        others = s.presence_penalty or s.frequency_penalty or self.grammar is not None
        return bool(self.repetition_penalty != 1 or others)

    def penalised(self, logits: Numbers, more: Sequence[int] = ()) -> Numbers:
        """The logits after all penalties, and -inf where the grammar forbids a token.

        The argument stays as it is.

        Args:
            logits: of the token after the text and `more`.
            more: tokens that may follow the text.
        """
        s, r = self.sampling, self.repetition_penalty
        # each penalty changes a copy: a draft's and the parent's rows are read again
        if r != 1:
            seen = [*self.seen, *more]
            found, logits = logits[seen], logits.copy()
            logits[seen] = np.where(found > 0, found / np.float32(r), found * np.float32(r))
        text = [*self.text, *more]
        if text and (s.presence_penalty or s.frequency_penalty):
            once, counts = np.unique(text, return_counts=True)
            logits = logits.copy()
            logits[once] -= (s.presence_penalty + s.frequency_penalty * counts).astype(np.float32)
        return logits if self.grammar is None else self.grammar.masked(logits, more)

    def chosen(self, logits: Numbers) -> int:
        """A token by its probability among those that may be drawn."""
        if self.by_kernels:
            return Chances(self, logits).draw()
        shares, tokens = self.drawable(logits)
        return self.any_of(shares) if tokens is None else int(tokens[self.place(shares)])

    def drawable(self, logits: Numbers) -> tuple[Numbers, Numbers | None]:
        """Shares of the tokens that may be drawn, and these tokens; None for all of them."""
        chances = softmax(logits, self.temperature)
        if not self.cuts:
            return chances, None
        ordered, tokens = self.likeliest(chances)
        if self.top_k is not None:
            # top-p counts shares of what top-k has left, as in transformers
            ordered = ordered / ordered.sum()
        # the probability of all tokens before this one: the first is always kept
        kept = ordered.cumsum() - ordered < self.top_p
        kept &= ordered >= self.min_p * ordered[0]
        count = int(kept.sum())
        return ordered[:count], tokens[:count]

    def any_of(self, chances: Numbers) -> int:
        """A token by its probability: a block of tokens, then one of the block.

        `torch.multinomial` takes a millisecond for 50,000 tokens, and five for 250,000.
        """
        count = -(-len(chances) // BLOCK)
        blocks = np.pad(chances, (0, count * BLOCK - len(chances))).reshape(count, BLOCK)
        block = self.place(blocks.sum(1))
        return min(block * BLOCK + self.place(blocks[block]), len(chances) - 1)

    def point(self) -> float:
        """A random number from 0 on, below 1."""
        if not self.points:  # the same numbers as one by one
            self.points = torch.rand(POINTS, generator=self.generator, dtype=torch.float64).tolist()
            self.points.reverse()
        return self.points.pop()

    def place(self, shares: Numbers) -> int:
        """A place by its share of the sum."""
        # float32 sums of 250,000 shares would lose the smallest ones
        sums = shares.cumsum(dtype=np.float64)
        found = np.searchsorted(sums, self.point() * sums[-1], side="right")
        return min(int(found), len(shares) - 1)

    def likeliest(self, chances: Numbers) -> tuple[Numbers, Numbers]:
        """Probabilities in descending order and their tokens, as many as may be needed.

        Of equal ones the first comes first.
        """
        k = self.top_k
        if k is not None and k < len(chances):
            found = np.flatnonzero(chances >= np.partition(chances, -k)[-k])
            tokens = found[np.argsort(-chances[found], kind="stable")][:k]
            return chances[tokens], tokens
        if k is None:
            found = np.flatnonzero(chances >= FIRST_LOOK * chances.max())
            tokens = found[np.argsort(-chances[found], kind="stable")]
            # they are enough if top-p ends among them, or if min-p keeps no smaller one
            if float(chances[tokens].sum()) > self.top_p or self.min_p >= FIRST_LOOK:
                return chances[tokens], tokens
        tokens = np.argsort(-chances, kind="stable")
        return chances[tokens], tokens


def softmax(logits: Numbers, temperature: float) -> Numbers:
    """Probabilities of all tokens, float32."""
    chances: Numbers = np.exp((logits - logits.max()) / np.float32(temperature))
    chances /= chances.sum()
    return chances


FILE = "generation_config.json"

DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""They count where `do_sample` is true, as in transformers."""

ALWAYS = ("repetition_penalty",)

NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values that change nothing."""


def generation_config(folder: Path) -> Any:
    """Transformers' own object for the file; None without a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not (folder / FILE).is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its checks raise many kinds of errors
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise _unreadable(folder / FILE, said[0]) from None


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation settings."""
    configured = model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in found if token is not None)


def sampling_in(folder: Path) -> dict[str, Any]:
    """The options of `Sampling` that a model's folder sets.

    Temperature, top-k, top-p and min-p are taken where `do_sample` is true. A model that samples
    without naming a temperature has temperature 1. `top_k` 0 means all tokens.

    Raises:
        CheckpointError: the file is not JSON, or holds a value that makes no sense.
    """
    settings = generation_config(folder)
    if settings is None:
        return {}
    samples = settings.do_sample is True
    names = (*(DRAWING if samples else ()), *ALWAYS)
    given = {name: getattr(settings, name) for name in names}
    found = {name: value for name, value in given.items() if value is not None}
    if samples:
        found.setdefault("temperature", 1.0)
    if found.get("top_k", 1) == 0:
        del found["top_k"]
    try:
        sampling_with({}, found)
    except RecipeError as error:
        raise _unreadable(folder / FILE, error.what) from None
    return {name: value for name, value in found.items() if value != NEUTRAL.get(name)}


def sampling_with(defaults: dict[str, Any], given: dict[str, Any]) -> Sampling:
    """Sampling by the options that were given, and else by those of the model.

    Args:
        defaults: from `sampling_in`.
        given: by name; None is not given. `top_k` 0 means all tokens.

    Raises:
        RecipeError: a number is out of range.
    """
    try:
        return Sampling(
            **(defaults | {k: value for k, value in given.items() if value is not None})
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        said = first["msg"].replace("Input should", "it should")
        raise RecipeError(f"{option} {first['input']}: {said}", where=option) from None


def _unreadable(file: Path, why: str) -> CheckpointError:
    """The error for a file that cannot be used."""
    return CheckpointError(
        f"the generation settings cannot be used: {why}",
        where=str(file),
        remedy="correct or delete the file; it only sets defaults",
    )


HALF = "\ufffd"
"""What tokenizers write for bytes that are no character, or not yet."""

LOOK_BACK = 6
"""Tokens before a piece of text that are decoded with it, because some tokenizers write a token
differently at the beginning of a text."""


class TextStream:
    """Turns tokens into text one at a time, and ends at a stop text.

    A piece of text is passed on when no later token can change it. Half of a character waits for
    its other bytes. A possible beginning of a stop text waits until it cannot be a stop text. Only
    the last tokens are decoded each time, so the work for a token does not grow with the text.

    Args:
        tokenizer: the model's tokenizer.
        stop: the text ends before the first of these.
        tell: receives each piece.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.stop, self.tell = tokenizer, [s for s in stop if s], tell
        self.longest_stop = max(map(len, self.stop), default=0)
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.passed_on = 0
        self.from_token = self.to_token = 0  # tokens before `to_token` are in the text
        self.stopped = False

    def add(self, token: int) -> bool:
        """Add a token. Return False if the text ends."""
        self.times.append(time.perf_counter())
        self.tokens.append(token)
        self.take(self.new_text(whole=True))
        return not self.stopped

    def new_text(self, *, whole: bool) -> str:
        """The text of the tokens that came last; with `whole`, once its characters are whole."""
        # Decoded with the tokens before them, and without them: the difference is their text.
        known = self.decoded(self.tokens[self.from_token : self.to_token])
        more = self.decoded(self.tokens[self.from_token :])
        if whole and more.endswith(HALF):
            return ""
        self.to_token = len(self.tokens)
        start = max(self.from_token, self.to_token - LOOK_BACK)
        if self.decoded(self.tokens[start:]):  # after special tokens alone a space would be lost
            self.from_token = start
        return more[len(known) :]

    def decoded(self, tokens: list[int]) -> str:
        """The text of some tokens, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def take(self, new: str) -> None:
        """Append text, and end at a stop text."""
        # a stop text may begin in what is there, but not before its own length
        begin = max(0, len(self.text) - self.longest_stop)
        self.text += new
        places = [place for s in self.stop if (place := self.text.find(s, begin)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
        self.pass_on(len(self.text) - (0 if self.stopped else self.waiting()))

    def waiting(self) -> int:
        """The number of characters at the end that may begin a stop text."""
        return max(
            (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
            default=0,
        )

    def pass_on(self, end: int) -> None:
        """Pass on the text up to a position."""
        if end > self.passed_on:
            self.tell(self.text[self.passed_on : end])
            self.passed_on = end

    def finish(self) -> None:
        """Pass on the remaining text, half a character at the end included."""
        if not self.stopped:
            self.take(self.new_text(whole=False))
        self.pass_on(len(self.text))
