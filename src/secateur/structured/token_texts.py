"""The texts that say which tokens a vocabulary needs, and what becomes of them without the others.

A text counts by its weight: a token has the mean of its shares in the texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import fsum
from typing import Any

from secateur.calibration.chats import Document
from secateur.calibration.documents import read_documents
from secateur.errors import RecipeError, VerificationError
from secateur.models.tokenizer import Tokenizer, text_tokens
from secateur.progress import Progress
from secateur.recipes.options import bytes_of
from secateur.recipes.shared import parts_of

BATCH = 256
"""Documents that are encoded at once."""


@dataclass(frozen=True)
class CountedText:
    """A text, and how often it has each token.

    Attributes:
        name: as the user named it.
        weight: its share among the texts, as a number above 0.
        documents: of the text.
        counts: by id.
    """

    name: str
    weight: float
    documents: Sequence[Document]
    counts: Counter[int]


ReadText = tuple[str, float, Sequence[Document]]
"""The name of a text, its weight, and its documents."""


def read_texts(named: str, field: str = "text") -> list[ReadText]:
    """The documents of texts that are named with or without weights: `de.jsonl=2,code.jsonl`."""
    return [(x, weight, [*read_documents(x, field=field)]) for x, weight in parts_of(named)]


def counted_texts(
    tokenizer: Tokenizer, texts: Sequence[ReadText], progress: Progress
) -> tuple[CountedText, ...]:
    """Count the tokens of texts.

    Raises:
        RecipeError: a text has no tokens.
    """
    found, remedy = list[CountedText](), "name a text that has some"
    progress.start("counting tokens", sum(-(-len(documents) // BATCH) for *_, documents in texts))
    for name, weight, documents in texts:
        counts = Counter(chain.from_iterable(_encoded(tokenizer, documents, progress)))
        if not counts:
            raise RecipeError("the text has no tokens", where=name, remedy=remedy)
        found.append(CountedText(name, weight, documents, counts))
    progress.finish()
    return tuple(found)


def weighted_shares(texts: Sequence[CountedText]) -> dict[int, float]:
    """How much of the texts each token is, by id: the mean of its shares by the texts' weights."""
    found, weights = dict[int, float](), fsum(text.weight for text in texts)
    for text in texts:
        tokens = text.counts.total()
        for token, count in text.counts.items():
            found[token] = found.get(token, 0) + text.weight / weights * (count / tokens)
    return found


def tokens_within(size: str, rows: int, whole: int, each: int) -> int:
    """The largest number of tokens whose files have at most some bytes.

    Args:
        size: with its unit, such as `2GiB`.
        rows: tokens there are.
        whole: bytes of the files with all of them.
        each: bytes of one.

    Raises:
        RecipeError: the files are larger without any token, or small enough already.
    """
    gone = -(-(whole - bytes_of(size)) // each)
    if not 0 < gone <= rows:
        raise RecipeError(
            f"the weight files have {whole:,} bytes, and {whole - rows * each:,} without any token",
            where="--vocabulary-size",
            remedy="give a size between them",
        )
    return rows - gone


def _encoded(
    tokenizer: Tokenizer, documents: Sequence[Document], progress: Progress
) -> Iterator[list[int]]:
    """The ids of each document, with the special tokens around it."""
    for start in range(0, len(documents), BATCH):
        texts = [documents[n] for n in range(start, min(start + BATCH, len(documents)))]
        yield from text_tokens(tokenizer, texts, ())
        progress.step()


def checked_texts(
    old: Tokenizer,
    new: Tokenizer,
    texts: Sequence[CountedText],
    kept: tuple[int, ...],
    progress: Progress,
) -> dict[str, Any]:
    """Encode every document of the texts with both tokenizers.

    Returns:
        Numbers of documents and tokens of each text, and how many of them stay.

    Raises:
        VerificationError: a document whose tokens all stay is cut into others.
    """
    number = {before: after for after, before in enumerate(kept)}  # new ids by old ones
    progress.start("checking tokens", sum(2 * -(-len(text.documents) // BATCH) for text in texts))
    found = list[dict[str, Any]]()
    for text in texts:
        same, tokens = 0, 0
        both = (_encoded(tokenizer, text.documents, progress) for tokenizer in (old, new))
        for place, (before, after) in enumerate(zip(*both, strict=True)):
            tokens += len(after)
            whole = [number[token] for token in before if token in number]
            same += len(whole) == len(before)
            if len(whole) == len(before) and whole != after:
                raise VerificationError(
                    f"document {place} of {text.name} becomes {len(after)} tokens, and not the "
                    f"same {len(before)} as before",
                    where=str(old.name_or_path),
                    remedy="this tokenizer cannot be trimmed: leave the vocabulary as it is, and "
                    "please report it",
                )
        found.append({
            "text": text.name, "weight": text.weight, "documents": len(text.documents),
            "same_documents": same, "tokens_before": text.counts.total(), "tokens_after": tokens,
            "covered": sum(text.counts[token] for token in kept) / text.counts.total(),
        })  # fmt: skip
    progress.finish()
    weights = sum(text.weight for text in texts)
    return {
        **{key: sum(x[key] for x in found) for key in ("documents", "same_documents")},
        "covered": sum(x["weight"] / weights * x["covered"] for x in found),
        "texts": found,
    }


def needs_all(rows: int, text: str) -> RecipeError:
    """An error: no token can go."""
    return RecipeError(
        f"the text needs all {rows} tokens",
        where=text,
        remedy="give --vocabulary-size, or a text that needs fewer",
    )
