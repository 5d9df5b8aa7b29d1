"""Speculative decoding: a draft proposes tokens, and one call of the parent checks them all.

A draft is a smaller model with the parent's vocabulary (`secateur draft` makes one). It proposes up
to seven tokens, each drawn from its own probabilities q. The parent computes its probabilities p
for all of them in one call, which takes little longer than a call for one token, because it reads
the same weights. A proposed token x is accepted with probability min(1, p(x) / q(x)). If it is not,
a token is drawn from the positive part of p − q, and the rest of the proposal is dropped. If all
are accepted, the parent's last probabilities give one token more. So every token has the parent's
probabilities, whatever the draft is (Leviathan et al., Fast Inference from Transformers via
Speculative Decoding, ICML 2023, arXiv 2211.17192; Chen et al., arXiv 2302.01318). Temperature,
top-k, top-p, min-p and penalties change p and q alike. At temperature 0 the text is the same as
without a draft, bit for bit: what the parent computes for a token does not depend on how many
tokens are in its call.

How many tokens are proposed is decided anew for each of them, by what calls take here and by how
often the draft was right when it was as sure as now. Where the draft costs more than it saves, it
sleeps for some tokens, each time for longer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.models.configuration import HEAD, MTP, type_of
from secateur.models.draft_head import read_head
from secateur.models.tokenizer import refuse_other_words
from secateur.recipes.deploy import Sampling
from secateur.runs.folder import NOTES
from secateur.runtime.decode import Decoder, SlotDecoder, Token, shared_length
from secateur.runtime.grammar import Grammar
from secateur.runtime.heads import HeadDecoder
from secateur.runtime.kernels.library import MAX_BATCH
from secateur.runtime.load import load
from secateur.runtime.mtp import MTPDecoder, check_tokens, mtp_of
from secateur.runtime.sampling import Chances, Draws

FREQUENT = "frequent_tokens.safetensors"
"""File in the notes of a draft: the tokens that it may propose, `ids` int64, ascending."""


class Guess(NamedTuple):
    """A token that a draft proposes.

    Args:
        token: its id.
        chances: the draft's probabilities, from which it was drawn; None at temperature 0, where
            it is the most likely token.
        sure: the largest of those probabilities; at temperature 0 that of a softmax of the logits.
    """

    token: int
    chances: Chances | None
    sure: float


class DraftedText(NamedTuple):
    """A text that goes on.

    Args:
        slot: of the parent and of the draft.
        ids: all of its tokens. The last one is in neither cache.
        draws: draws its tokens.
        most: how many tokens may be proposed.
    """

    slot: int
    ids: Sequence[int]
    draws: Draws
    most: int


BINS = 10
"""Acceptance is learned for each tenth of the draft's largest probability."""

PRIOR = 4.0
"""So many imagined proposals of each bin were accepted as often as the draft was sure."""

FORGETTING = 0.98
"""What was accepted counts so much less with each later proposal of its bin."""

LOST = 4.0
"""The draft falls asleep when it has lost the seconds of so many tokens."""

NAPS = (128, 2048)
"""Calls of the first sleep and of the longest one; each is four times as long as the one before."""

RECENT = 64
"""So many calls say what a call takes."""

PLAIN_EVERY = 32
"""One call in so many has no proposal, so that it is known what a token takes without a draft."""


class CallSeconds:
    """Seconds of a call by its number of tokens: the least of such calls among the last `RECENT`.

    The least, because a call that the machine interrupted is no measure of what one costs. A number
    of tokens that was not among them counts as the next smaller one, so that it is tried.

    Attributes:
        least: by number of tokens.
    """

    def __init__(self) -> None:
        self.calls = deque[tuple[int, float]](maxlen=RECENT)
        self.least = dict[int, float]()

    def note(self, tokens: int, seconds: float) -> None:
        """Add a call."""
        self.calls.append((tokens, seconds))
        self.least = {}
        for count, taken in self.calls:
            self.least[count] = min(taken, self.least.get(count, taken))

    def seconds(self, tokens: int) -> float:
        """What a call of so many tokens takes; 0 before the first call."""
        known = max((n for n in self.least if n <= tokens), default=min(self.least, default=0))
        return self.least.get(known, 0.0)


class Pace:
    """Decides how many tokens a draft proposes.

    A draft is asked for one more token, and the token is proposed, while

        P(all before are accepted) · P(this one is accepted) · seconds of a token  >  what it costs

    Before the draft has computed it, the cost is that of the draft, and the usual acceptance
    counts; then that of the parent's longer call. The probability that a token is accepted is
    learned by how sure the draft is, of its most likely token and not of the drawn one: a choice by
    the drawn token would change the distribution.

    Attributes:
        parent, draft: what their calls take.
        asleep: calls until the draft is tried again.
    """

    def __init__(self) -> None:
        self.parent, self.draft = CallSeconds(), CallSeconds()
        # accepted and proposed, for each bin
        self.right = [[PRIOR * (place + 0.5) / BINS, PRIOR] for place in range(BINS)]
        self.usual = [PRIOR / 2, PRIOR]
        self.spent = self.gained = self.lost = 0.0
        self.rounds = self.tried = self.asleep = 0
        self.nap = NAPS[0]

    def awake(self) -> bool:
        """Whether the draft proposes for the next call."""
        if self.asleep:
            self.asleep -= 1
            return False
        self.rounds += 1
        return bool(self.parent.least) and self.rounds % PLAIN_EVERY != 0

    def token_seconds(self, texts: int) -> float:
        """What a token takes in a call without proposals."""
        return self.parent.seconds(texts) / texts

    def value(self, texts: int) -> float:
        """The seconds that an accepted token saves."""
        plain = self.token_seconds(texts)
        return min(plain, self.spent / self.gained) if self.gained else plain

    def accepts(self, sure: float) -> float:
        """The probability that a token is accepted."""
        accepted, proposed = self.right[self.place(sure)]
        return accepted / proposed

    def place(self, sure: float) -> int:
        """The bin of a probability."""
        return min(int(sure * BINS), BINS - 1)

    def judged(self, guess: Guess, accepted: bool) -> None:
        """Note what became of a token that the parent has judged."""
        for counts in (self.right[self.place(guess.sure)], self.usual):
            counts[0] = FORGETTING * counts[0] + accepted
            counts[1] = FORGETTING * counts[1] + 1

    def round(self, texts: int, seconds: float, tokens: int) -> None:
        """Note what a round with a draft took and gave; the draft may fall asleep."""
        self.spent, self.gained = 0.9 * self.spent + seconds, 0.9 * self.gained + tokens
        self.tried += 1
        # what was gained long ago does not count: a text may change
        plain = self.token_seconds(texts)
        self.lost = max(0.0, self.lost + seconds - tokens * plain)
        if self.lost > LOST * plain:
            self.asleep, self.nap = self.nap, min(4 * self.nap, NAPS[1])
            self.spent = self.gained = self.lost = 0.0
            self.tried = 0
        elif self.tried > PLAIN_EVERY:
            self.nap = NAPS[0]


class Drafter:
    """Proposes the next tokens of one or several texts.

    Args:
        decoder: decodes the draft, with a slot for each one of the parent.
        vocabulary: tokens of the parent.
        ids: the token of each logit of the draft, int64; None where they are the same.
        clock: seconds.

    Attributes:
        proposed, accepted: tokens so far.
        pace: how many tokens it proposes.
    """

    def __init__(
        self,
        decoder: Any,
        vocabulary: int,
        ids: Int64[Tensor, " drafted"] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.decoder, self.vocabulary, self.ids, self.clock = decoder, vocabulary, ids, clock
        self.texts = [list[int]() for _ in decoder.lengths]
        self.pace = Pace()
        self.proposed = self.accepted = 0
        self.drafting = 0.0

    def propose(self, texts: Sequence[DraftedText], room: int) -> list[list[Guess]]:
        """What the draft thinks that comes next, for each text.

        Args:
            texts: at most as many as a call takes.
            room: how many tokens may be proposed for all of them together.

        Returns:
            The proposals of each text; nothing where it does not pay.
        """
        found = [list[Guess]() for _ in texts]
        self.drafting = 0.0
        if room < 1 or not self.pace.awake():
            return found
        # the probability that the parent accepts all tokens that are proposed so far
        reach = [1.0] * len(texts)
        unread = [self.unread(text) if text.most > 0 else [] for text in texts]
        value, usual = self.pace.value(len(texts)), self.pace.usual
        while left := [n for n, ids in enumerate(unread) if ids]:
            began, read = self.clock(), sum(len(unread[n]) for n in left)
            rows = self.step([(texts[n].slot, unread[n]) for n in left])
            for n, logits in zip(left, rows, strict=True):
                unread[n] = []
                before = [guess.token for guess in found[n]]
                guess = guessed(texts[n].draws, logits, self.vocabulary, self.ids, before)
                size = len(texts) + sum(map(len, found))
                # what the parent's call takes longer with one token more
                more = self.pace.parent.seconds(size + 1) - self.pace.parent.seconds(size)
                reach[n] *= self.pace.accepts(guess.sure)
                if size == len(texts) + room or reach[n] * value < more:
                    continue
                found[n].append(guess)
                cost = self.pace.draft.seconds(len(left)) / len(left)
                if len(found[n]) < texts[n].most and reach[n] * usual[0] / usual[1] * value > cost:
                    unread[n] = [guess.token]
            self.pace.draft.note(read, self.clock() - began)
            self.drafting += self.pace.draft.seconds(read)
        return found

    def unread(self, text: DraftedText) -> list[int]:
        """One or two tokens of a text that the draft has not read; others are read here."""
        known, ids = self.texts[text.slot], [*text.ids]
        # rejected tokens are in the draft's cache too: it goes back to what both have in common
        begin = self.decoder.kept(text.slot, min(shared_length(known, ids), len(ids) - 1))
        self.decoder.rewind(text.slot, begin)
        rest = ids[begin:]
        if len(rest) > 2:
            self.decoder.read(text.slot, torch.tensor(rest[:-1]))
            rest = rest[-1:]
        self.texts[text.slot] = ids[: self.decoder.lengths[text.slot]]
        return rest

    def step(self, texts: Sequence[tuple[int, list[int]]]) -> Float[Tensor, "texts vocabulary"]:
        """Read a few tokens of each text; returns the logits after the last one."""
        tokens = []
        for slot, ids in texts:
            first = self.decoder.lengths[slot]
            last = len(ids) - 1
            tokens += [Token(slot, first + n, token, n == last) for n, token in enumerate(ids)]
            self.texts[slot] += ids
        calls = [tokens[n : n + MAX_BATCH] for n in range(0, len(tokens), MAX_BATCH)]
        rows = [self.decoder.step(call) for call in calls]
        # torch copies large rows with threads that wait awake for milliseconds, in the parent's way
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def judged(self, guesses: Sequence[Guess], tokens: int) -> None:
        """Note that a proposal of a text gave so many tokens; the last one is the parent's own."""
        for number, guess in enumerate(guesses[:tokens], start=1):
            self.pace.judged(guess, number < tokens)
        self.proposed += len(guesses)
        self.accepted += min(tokens - 1, len(guesses))

    def called(self, guesses: Sequence[Sequence[Guess]], seconds: float, tokens: int) -> None:
        """Note a call of the parent for some texts: its seconds, and the tokens that it gave.

        Whether the draft pays is judged by what such calls usually take, so that one which the
        machine interrupted does not count; rounds in which the draft did nothing do not either.
        """
        size = len(guesses) + sum(map(len, guesses))
        self.pace.parent.note(size, seconds)
        if self.drafting:
            usual = self.pace.parent.seconds(size) + self.drafting
            self.pace.round(len(guesses), usual, tokens)


def guessed(
    draws: Draws,
    row: Float[Tensor, " drafted"],
    vocabulary: int,
    ids: Int64[Tensor, " drafted"] | None = None,
    before: Sequence[int] = (),
) -> Guess:
    """Draw a token from a draft's probabilities.

    Args:
        draws: draws the tokens of the text.
        row: the draft's logits.
        vocabulary: tokens of the parent.
        ids: the token of each logit, ascending; None where they are the same.
        before: tokens that are proposed already.
    """
    logits, at = row.numpy(), None if ids is None else ids.numpy()
    known = vocabulary if at is None else int(at.searchsorted(vocabulary))
    logits, at = logits[:known], None if at is None else at[:known]
    if draws.penalises and (at is not None or len(logits) < vocabulary):
        # penalties and grammars count tokens by their number
        every = np.full(vocabulary, -np.inf, dtype=np.float32)
        every[slice(len(logits)) if at is None else at] = logits
        logits, at = every, None
    chances = Chances(draws, draws.penalised(logits, before), at)
    if draws.temperature == 0:
        return Guess(chances.token, None, chances.sure)
    return Guess(chances.draw(), chances, chances.sure)


class HeadDrafter(Drafter):
    """Proposes with a head, or an MTP layer, that reads the parent's states.

    It has no text of its own: what it reads before it proposes are the states that the parent has
    computed since, in one call. Where the parent knows the beginning of a text without having
    computed it (`SlotDecoder.copy_in`), the head knows the text from there on.

    Args:
        decoder: decodes the head.
        parent: its decoder.
        ids: as of `Drafter`.
        clock: seconds.
    """

    decoder: Any

    def __init__(
        self,
        decoder: HeadDecoder | MTPDecoder,
        parent: Any,
        ids: Int64[Tensor, " drafted"] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(decoder, parent.vocabulary, ids, clock)
        self.states = parent
        self.begins = [0] * len(decoder.lengths)
        """The parent's position of the first one of each slot."""

    def unread(self, text: DraftedText) -> list[int]:
        """The tokens after the states that the head has not read; most of many are read here."""
        slot, ids = text.slot, text.ids
        unchanged, states = self.states.take_states(slot)
        first = len(ids) - 1 - len(states)  # the last token is in no cache
        known = self.begins[slot] + self.decoder.lengths[slot]
        if not self.begins[slot] <= first == unchanged <= known:
            self.begins[slot] = first
        self.decoder.rewind(slot, first - self.begins[slot])
        self.decoder.give(slot, states)
        self.texts[slot] = []
        rest = [*ids[first + 1 :]]
        if len(rest) > MAX_BATCH:
            self.decoder.read(slot, torch.tensor(rest[:-1]))
            rest = rest[-1:]
        return rest


def verified(
    draws: Draws, logits: Float[Tensor, "tokens vocabulary"], guesses: Sequence[Guess]
) -> Iterator[int]:
    """The tokens that a proposal gives: those accepted, and one more.

    Args:
        draws: draws the tokens of the text, and notes them.
        logits: of the parent, after the text and after each proposed token.
        guesses: what was proposed.
    """
    for place, row in enumerate(logits):
        guess = guesses[place] if place < len(guesses) else None
        if guess is None or guess.chances is None:
            token = draws.draw(row)
        else:
            token = accepted_or_drawn(Chances(draws, draws.penalised(row.numpy())), guess)
            draws.note(token)
        yield token
        if guess is None or token != guess.token:
            return


def accepted_or_drawn(p: Chances, guess: Guess) -> int:
    """A token with probabilities p: the proposed one, or one of the positive part of p − q.

    Both can be the same token only if it was accepted, because p is less than q where a token is
    rejected.
    """
    q = guess.chances
    assert q is not None
    # u < p / q, written without a division by a probability that may be 0
    accepted = p.draws.point() * q.of(guess.token) < p.of(guess.token)
    return guess.token if accepted else p.draw(less=q)


def speculated(
    decoder: Decoder,
    drafter: Drafter,
    ids: Int64[Tensor, " tokens"],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    stop: Collection[int] = (),
    grammar: Grammar | None = None,
) -> Generator[int]:
    """Yield the tokens that follow a prompt, as `decode.continued`, with a draft.

    Raises:
        ShapeError: prompt and new tokens do not fit.
        GrammarError: no token can follow.
    """
    text, slots, clock = ids.tolist(), decoder.slots, drafter.clock
    draws, last = Draws(sampling, text, grammar), len(text) + max_new_tokens
    tokens, guesses = [draws.draw(decoder.prefill(ids))], list[Guess]()
    while True:
        for token in tokens:
            if token in stop:
                return
            text.append(token)
            yield token
        if len(text) >= last:
            return
        room = min(last - len(text) - 1, MAX_BATCH - 1)
        [guesses] = drafter.propose([DraftedText(0, text, draws, room)], room)
        # the last token of the text is in no cache yet, so it is the first of the call
        begin, began = len(text) - 1, clock()
        decoder.text = [*text, *(guess.token for guess in guesses)]
        logits = slots.step([Token(0, begin + n, x) for n, x in enumerate(decoder.text[begin:])])
        tokens = [*verified(draws, logits, guesses)]
        seconds = clock() - began
        slots.rewind(0, begin + len(tokens))
        drafter.judged(guesses, len(tokens))
        drafter.called([guesses], seconds, len(tokens))


def open_drafter(draft: Path, folder: Path, parent: Any, tokenizer: Any) -> Drafter:
    """Load what proposes tokens to a model: a smaller one, a head, or its own MTP layer.

    Args:
        draft: its folder; a smaller model may be compressed.
        folder: of the model.
        parent: decodes the model; the draft gets as many slots of the same length.
        tokenizer: of the model.

    Raises:
        RecipeError: the draft has another vocabulary, or is a head of another parent.
        ArchitectureError: our loop cannot decode it, or the model has no MTP layers.
        CheckpointError: its tokens, or a head, cannot be read.
    """
    kind = type_of(draft)
    if kind == MTP:
        mtp, ids = mtp_of(parent.model, folder, draft)
        return HeadDrafter(MTPDecoder(mtp, parent), parent, ids)
    if kind == HEAD:
        head = read_head(draft)
        own = head.config.hidden_size, head.config.vocab_size
        if own != (parent.c.hidden, parent.vocabulary) or max(head.taps) > parent.c.layers:
            raise RecipeError(
                f"this draft head is one of another model, of hidden size {own[0]} with {own[1]} "
                f"tokens, and it reads states after {max(head.taps)} layers",
                where=str(draft),
                remedy="make one of this model: secateur draft MODEL --head",
            )
        return HeadDrafter(HeadDecoder(head, parent, head.values), parent, head.ids)
    refuse_other_words(tokenizer, draft, roles=("model", "draft"))
    model = load(draft)
    ids = frequent_tokens(draft, model.get_output_embeddings().out_features)
    slots = len(parent.lengths)
    return Drafter(SlotDecoder(model, parent.capacity, slots, head=ids), parent.vocabulary, ids)


def frequent_tokens(folder: Path, vocabulary: int) -> Int64[Tensor, " drafted"] | None:
    """The tokens that a draft may propose; None for all.

    Raises:
        CheckpointError: the file is damaged, or has no ascending ids of the vocabulary.
    """
    file = folder / NOTES / FREQUENT
    if not file.exists():
        return None
    try:
        ids = load_file(file)["ids"]
        check_tokens(ids, vocabulary)
    except Exception as error:  # safetensors raises several kinds
        raise CheckpointError(
            f"the draft's frequent tokens cannot be used: {error}",
            where=str(file),
            remedy="delete the file: the draft then proposes any token",
        ) from None
    return ids
