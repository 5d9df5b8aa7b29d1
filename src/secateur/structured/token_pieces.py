"""How a tokenizer makes its tokens, which of them stay, and what these need.

BPE (Sennrich et al. 2016, arXiv:1508.07909) begins with the letters of a word, or its bytes, and
merges the pair of lowest rank until there is none. While it makes a token t within a word, pairs
across the border of t are never merged, for else t would not be one of the tokens in the end. So
the merges within t are those that BPE does on t alone. Let K be closed: with every token it has all
tokens that BPE makes on the way to it. Keep the merges whose two parts and whose result are in K,
in their order. Then a word whose tokens are in K is cut into the same tokens as before: every merge
that was done is still there, and there is no merge that was not there before.

Unigram (Kudo 2018, arXiv:1804.10959) takes the most probable way to cut a text into pieces. If its
pieces stay, it is still there and still the most probable. An unknown character costs the lowest
score of all pieces and 10 more, so a piece of the lowest score stays too.

WordPiece (Schuster and Nakajima 2012; Devlin et al. 2019, arXiv:1810.04805) takes the longest piece
that a word begins with, then the longest that its rest begins with. If this piece stays, it is
still the longest, for none was added. So a word whose pieces stay is cut as before. A word in which
no piece fits is unknown as a whole. Trainers make each letter of a piece a piece too. Then these
are the words with a letter that is none. All single letters stay, so the same words are unknown,
and no other. WordLevel has only whole words; those that leave become unknown.

Bytes always stay: as 256 letters of a byte-level tokenizer, or as <0x00> to <0xFF>. So every text
can still be encoded. A tokenizer without bytes keeps all single characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain, pairwise
from math import fsum, inf
from typing import Any

from secateur.errors import ArchitectureError, RecipeError
from secateur.models.checkpoint import damaged
from secateur.models.tokenizer import BYTE_TOKENS, byte_letters


def pieces_of(tokenizer: Mapping[str, Any], where: str) -> Pieces:
    """The pieces of a tokenizer.

    Args:
        tokenizer: the content of `tokenizer.json`.
        where: the file, for messages.

    Raises:
        ArchitectureError: tokens of this kind of tokenizer cannot be removed.
        CheckpointError: the file is damaged.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping):
        raise damaged("the tokenizer cannot be read: it has no model", where)
    kind = model.get("type")
    if kind is None:  # files of early releases do not say it
        marks = {"merges": "BPE", "unk_id": "Unigram", "continuing_subword_prefix": "WordPiece"}
        kind = next((marks[key] for key in marks if key in model), "unknown")
    try:
        if kind == "BPE":
            if prefix := model.get("continuing_subword_prefix"):  # of tokens within words
                what = f"a BPE tokenizer with continuing_subword_prefix {prefix!r}"
                raise untrimmed(f"tokens of {what} cannot be removed yet", where)
            parts = json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("normalizer")])
            return MergedPieces(model, '"ByteLevel"' in parts)
        if kind == "Unigram":
            return ScoredPieces(model)
        if kind in ("WordPiece", "WordLevel") and model.get("unk_token") in model["vocab"]:
            return LongestPieces(model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the tokenizer cannot be read: {type(error).__name__}: {error}"
        raise damaged(what, where) from error
    raise ArchitectureError(
        f"tokens of a {kind} tokenizer cannot be removed yet",
        where=where,
        remedy="BPE, Unigram, WordPiece and WordLevel with a token for unknown words are known; "
        "leave the vocabulary as it is",
    )


def untrimmed(what: str, where: str | None = None) -> ArchitectureError:
    """An error: tokens of this model cannot be removed."""
    return ArchitectureError(what, where=where, remedy="leave the vocabulary as it is")


class MergedPieces:
    """The tokens of BPE.

    Args:
        model: of `tokenizer.json`, or as there.
        byte_level: whether its letters are bytes.
        letters: whether only letters that have a token are merged. llama.cpp merges all.
    """

    def __init__(self, model: Mapping[str, Any], byte_level: bool, letters: bool = True) -> None:
        self.model, self.byte_level, self.letters = model, byte_level, letters
        self.suffix = str(model.get("end_of_word_suffix") or "")  # of the last letter of a word
        self.ids: Mapping[str, int] = dict(model["vocab"])
        self.merges = [_pair_of(merge) for merge in model["merges"]]
        # Reversed, so that of a pair that is there twice the lower rank stays.
        self.ranks = {pair: rank for rank, pair in reversed([*enumerate(self.merges)])}
        self.known_parts: dict[str, set[str]] = {}

    def always(self) -> set[str]:
        """The bytes and the unknown token; without bytes, all single characters."""
        unknown = self.model.get("unk_token")
        found = {str(unknown)} & self.ids.keys() if unknown is not None else set()
        if self.byte_level:
            letters = {letter + end for letter in byte_letters() for end in ("", self.suffix)}
            return found | (letters & self.ids.keys())
        if self.model.get("byte_fallback") and self.ids.keys() >= BYTE_TOKENS:
            return found | BYTE_TOKENS
        return found | {token for token in self.ids if len(token.removesuffix(self.suffix)) == 1}

    def rank(self, pair: tuple[str, str]) -> float | None:
        """The place of a merge among all, the lowest first; None if there is no such merge."""
        return self.ranks.get(pair)

    def parts_of(self, token: str) -> set[str]:
        """What BPE makes of the token's letters; a token that it never reaches stays alone.

        Such a token is found whole in the vocabulary (`ignore_merges`). The last letter of a word
        has the suffix.
        """
        if token not in self.known_parts:
            # As BPE does it: the pair of lowest rank, leftmost of equal ones, until none is left.
            parts, ends = list(token), bool(self.suffix) and token.endswith(self.suffix)
            if ends and token != self.suffix:
                parts = list(token.removesuffix(self.suffix))
                parts[-1] += self.suffix
            made = set(parts)
            while len(parts) > 1:
                ranked = [
                    (rank, place)
                    for place, pair in enumerate(pairwise(parts))
                    if (rank := self.rank(pair)) is not None
                ]
                if not ranked:
                    break
                place = min(ranked)[1]
                parts[place : place + 2] = ["".join(parts[place : place + 2])]
                made.add(parts[place])
            reached = len(parts) == 1 and (made <= self.ids.keys() or not self.letters)
            self.known_parts[token] = {token} | (made & self.ids.keys() if reached else set())
        return self.known_parts[token]

    def trimmed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """Tokens in the order of their ids, and the merges between them in theirs."""
        vocab = dict(sorted(kept.items(), key=lambda entry: entry[1]))
        merges = [
            [first, second]
            for first, second in self.merges
            if first in kept and second in kept and first + second in kept
        ]
        return {**self.model, "vocab": vocab, "merges": merges}


class MergedByScore(MergedPieces):
    """The tokens of SentencePiece's BPE: the pair whose piece has the highest score is merged.

    Args:
        model: with `vocab`, ids by piece, and `byte_fallback`.
        scores: of the pieces, by id.
    """

    def __init__(self, model: Mapping[str, Any], scores: Sequence[float]) -> None:
        super().__init__({**model, "merges": ()}, byte_level=False, letters=False)
        self.scores = scores

    def rank(self, pair: tuple[str, str]) -> float | None:
        """The higher the score, the lower the rank."""
        number = self.ids.get("".join(pair))
        return None if number is None else -self.scores[number]


def _pair_of(merge: Any) -> tuple[str, str]:
    """The two parts of a merge, as a list or as a text with a space between them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


class ScoredPieces:
    """The pieces of a Unigram model.

    Args:
        model: of `tokenizer.json`.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model
        self.scores = [(str(piece), float(score)) for piece, score in model["vocab"]]
        self.ids: Mapping[str, int] = {piece: n for n, (piece, _) in enumerate(self.scores)}

    def always(self) -> set[str]:
        """The bytes, the unknown piece and one of the lowest score; without bytes, characters."""
        found = {min(self.scores, key=lambda entry: entry[1])[0]}
        if self.model.get("unk_id") is not None:
            found.add(self.scores[self.model["unk_id"]][0])
        names = self.ids.keys()
        if self.model.get("byte_fallback") and names >= BYTE_TOKENS:
            return found | BYTE_TOKENS
        return found | {piece for piece in names if len(piece) == 1}

    def parts_of(self, token: str) -> set[str]:
        """The token alone."""
        return {token}

    def trimmed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """Pieces in the order of their ids."""
        order = sorted(kept, key=lambda piece: kept[piece])
        scores, unknown = dict(self.scores), self.model.get("unk_id")
        name = None if unknown is None else self.scores[unknown][0]
        return {
            **self.model,
            "vocab": [[piece, scores[piece]] for piece in order],
            "unk_id": None if name is None else order.index(name),
        }


class LongestPieces:
    """The pieces of WordPiece, or the words of WordLevel.

    Args:
        model: of `tokenizer.json`, or as there. The prefix marks pieces within words; those of
            llama.cpp mark where a word begins.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model, self.ids = model, dict[str, int](model["vocab"])
        self.prefix = str(model.get("continuing_subword_prefix") or "")

    def always(self) -> set[str]:
        """The unknown token, and all single characters, with the prefix and without."""
        found = {str(self.model.get("unk_token"))} & self.ids.keys()  # llama.cpp names none
        return found | {piece for piece in self.ids if len(piece.removeprefix(self.prefix)) == 1}

    def parts_of(self, token: str) -> set[str]:
        """The token alone."""
        return {token}

    def trimmed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """Pieces in the order of their ids."""
        return {**self.model, "vocab": dict(sorted(kept.items(), key=lambda entry: entry[1]))}


Pieces = MergedPieces | ScoredPieces | LongestPieces
"""The tokens that a tokenizer makes from text, without those that were added to it."""


def kept_tokens(
    pieces: Pieces,
    shares: Mapping[int, float],
    always: Set[int],
    size: int | float | None = None,
    multiple: int = 1,
) -> tuple[int, ...]:
    """The ids that stay, ascending.

    Args:
        pieces: of the tokenizer.
        shares: how much of the text each token is, by id; together 1.
        always: ids that stay whatever the text has: special tokens, ids in configurations.
        size: keep at most this number, the most frequent ones first, each with all tokens on the
            way to it. A float is the share of the text that may be lost. None keeps every token
            that the text has.
        multiple: the number of tokens is a multiple of this: at most `size`, else rounded up, with
            the next tokens of the text, then those of the lowest ids.

    Raises:
        RecipeError: fewer tokens than have to stay.
    """
    names = {number: token for token, number in pieces.ids.items()}
    kept = {pieces.ids[token] for token in pieces.always()} | always

    def missing(number: int) -> set[int]:
        if number not in names:  # it was added to the tokenizer, which does not make it
            return {number} - kept
        return {pieces.ids[token] for token in pieces.parts_of(names[number])} - kept

    def fill(numbers: Iterable[int], most: float) -> None:
        # A rare one may still fit after a frequent one that brings too many parts.
        for number in numbers:
            if len(kept) >= most:
                break
            more = missing(number)
            if len(kept) + len(more) <= most:
                kept.update(more)

    most = size - size % multiple if isinstance(size, int) else inf
    if len(kept) > most:
        raise RecipeError(
            f"{len(kept)} tokens have to stay: bytes or letters, special tokens, and those that "
            "configurations name",
            where="--vocabulary-size",
            remedy=f"give a number of at least {-(-len(kept) // multiple) * multiple}, or as many "
            "bytes as that takes",
        )
    # The most frequent first; of equally frequent ones the lower id.
    order = sorted(shares, key=lambda token: (-shares[token], token))
    if isinstance(size, float):
        lost = fsum(share for token, share in shares.items() if token not in kept)
        for number in order:
            if lost <= size:
                break
            more = missing(number)
            kept |= more
            lost -= fsum(shares.get(token, 0) for token in more)
    else:
        fill(order, most)
    others = (number for number in sorted(names) if number not in shares)
    fill(chain(order, others), -(-len(kept) // multiple) * multiple)
    return tuple(sorted(kept))
