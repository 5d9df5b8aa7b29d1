"""Which tokens of a vocabulary stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.errors import RecipeError
from secateur.structured.vocabulary.pieces import Pieces


@dataclass(frozen=True)
class TokenUse:
    """What a text needs of a vocabulary.

    Attributes:
        counts: how often the text has each token, by id.
        always: ids that stay whatever the text has: special tokens, ids in configurations.
    """

    counts: Mapping[int, int]
    always: frozenset[int]

    def share(self, kept: Iterable[int]) -> float:
        """The share of the text's tokens that stay."""
        total = sum(self.counts.values())
        return sum(self.counts.get(token, 0) for token in kept) / total if total else 1.0


def kept_tokens(pieces: Pieces, use: TokenUse, size: int | None = None) -> tuple[int, ...]:
    """The ids that stay, ascending.

    Args:
        pieces: of the tokenizer.
        use: what the text needs.
        size: keep at most this number, the most frequent ones first, each with all tokens on the
            way to it; None keeps every token that the text has.

    Raises:
        RecipeError: fewer tokens than have to stay.
    """
    names = {number: token for token, number in pieces.ids.items()}
    kept = {pieces.ids[token] for token in pieces.always()} | use.always

    def needed(number: int) -> set[int]:
        if number not in names:  # it was added to the tokenizer, which does not make it
            return {number}
        return {pieces.ids[token] for token in pieces.way_to(names[number])}

    if size is not None and len(kept) > size:
        raise RecipeError(
            f"{len(kept)} tokens have to stay: bytes or letters, special tokens, and those that "
            "configurations name",
            where="--vocabulary-size",
            remedy=f"give a number of at least {len(kept)}",
        )
    for number in sorted(use.counts, key=lambda token: (-use.counts[token], token)):
        more = needed(number) - kept
        if size is None or len(kept) + len(more) <= size:
            kept |= more
    return tuple(sorted(kept))
