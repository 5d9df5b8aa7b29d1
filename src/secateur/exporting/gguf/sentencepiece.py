"""SentencePiece tokenizers: BPE over characters, and byte tokens for other characters.

llama.cpp merges the two neighbours whose piece has the highest score. transformers merges them by
the order of a list of merges. Both give the same tokens if the list follows the pieces: the merges
that make a piece stand together, and each pair of pieces that makes a piece is in the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.exporting.gguf.refusals import refused

SPACE = "\u2581"
"""The sign for a space in a piece."""

ESCAPED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, ESCAPED]}

NO_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""Gemma's; no space is left to split at."""


@dataclass(frozen=True)
class SpaceRules:
    """How a tokenizer treats spaces.

    Attributes:
        prefix: whether a text gets a space in front.
        note: where llama.cpp differs; empty where it does not.
    """

    prefix: bool
    note: str = ""


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` describes BPE over characters with byte tokens."""
    model = tokenizer["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def space_rules(tokenizer: dict[str, Any], where: str) -> SpaceRules:
    """How a SentencePiece tokenizer treats spaces.

    Args:
        tokenizer: the content of `tokenizer.json`.
        where: the folder, for errors.

    Raises:
        CheckpointError: llama.cpp cannot do the same.
    """
    normalizer, splits = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if normalizer == {"type": "Sequence", "normalizers": []}:
        normalizer = None
    if normalizer == PREFIXED and splits is None:
        return SpaceRules(prefix=True)
    if normalizer == ESCAPED and (splits is None or splits == NO_SPLIT):
        return SpaceRules(prefix=False)
    if normalizer is None and splits and splits["type"] == "Metaspace" and not splits["split"]:
        return metaspace_rules(splits["prepend_scheme"])
    raise refused(f"it treats spaces by {normalizer} and {splits}"[:300], where)


def metaspace_rules(scheme: str) -> SpaceRules:
    """The rules of transformers' own classes for Llama's tokenizer."""
    if scheme == "never":
        return SpaceRules(prefix=False)
    note = "a text that begins with a space gets one more in llama.cpp, as in SentencePiece"
    if scheme == "first":
        note += ", and so does the text behind a special token"
    return SpaceRules(prefix=True, note=note)


def piece_scores(tokenizer: dict[str, Any], added: set[str], where: str) -> dict[str, float]:
    """The score of each piece by which llama.cpp merges like the list of merges.

    Args:
        tokenizer: the content of `tokenizer.json`.
        added: tokens that are found in the text before it is merged.
        where: the folder, for errors.

    Raises:
        CheckpointError: there are no such scores, or bytes have no token.
    """
    model = tokenizer["model"]
    odd = [n for n in ("dropout", "ignore_merges", "continuing_subword_prefix") if model.get(n)]
    if odd or model.get("end_of_word_suffix"):
        raise refused(f"its BPE sets {', '.join(odd) or 'end_of_word_suffix'}", where)
    vocabulary = model["vocab"]
    for byte in range(256):
        if f"<0x{byte:02X}>" not in vocabulary and chr(byte) not in vocabulary:
            raise refused(f"the byte {byte} has no token", where)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    scores: dict[str, float] = {}
    last = None
    for left, right in merges:
        piece = left + right
        if piece in added:
            continue
        if piece in scores and piece != last:
            raise refused(f"the merges that make {piece!r} do not stand together", where)
        scores.setdefault(piece, -float(len(scores)))
        last = piece
    refuse_unlisted(vocabulary, set(merges), added, where)
    return scores


def refuse_unlisted(
    vocabulary: dict[str, int], merges: set[tuple[str, ...]], added: set[str], where: str
) -> None:
    """Refuse pieces that llama.cpp would merge from a pair that is not in the list."""
    pieces = vocabulary.keys() - added
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = left, right = piece[:cut], piece[cut:]
            whole = all(len(part) == 1 or part in pieces for part in pair)
            if whole and pair not in merges:
                raise refused(f"{left!r} and {right!r} are never merged to {piece!r}", where)
