"""Tokenizers of transformers as the fields of a GGUF file.

llama.cpp knows two kinds: byte-level BPE with rules that it has names for, and SentencePiece with a
score for each piece. A tokenizer that it would not follow exactly is refused.

SentencePiece tokenizers are BPE over characters, with byte tokens for other characters. llama.cpp
merges the two neighbours whose piece has the highest score. transformers merges them by
the order of a list of merges. Both give the same tokens if the list follows the pieces: the merges
that make a piece stand together, and each pair of pieces that makes a piece is in the list.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from secateur.exporting.gguf.architectures import refused
from secateur.models.tokenizer import load_tokenizer, start_tokens

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

TURNS = {"eot_token_id": "<|user|>", "eom_token_id": "<|observation|>"}
"""With these GLM ends its turn. llama.cpp does not know it by their texts, as it does others."""

NOT_STRIPPING = {"<unk>", "<s>", "<|endoftext|>"}
"""The tokens of Phi-3 that keep the spaces behind them."""


@dataclass
class LlamaCppVocabulary:
    """A tokenizer in the terms of llama.cpp.

    Attributes:
        fields: `{field: value}`; a field is what follows `add_` in the writer of gguf.
        strips: whether special tokens swallow the spaces behind them, as Phi-3's do. llama.cpp does
            that for models with `phi-3` in their name.
        notes: where llama.cpp differs, one sentence each.
    """

    fields: dict[str, Any]
    strips: bool = False
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, rows: int) -> LlamaCppVocabulary:
    """The tokenizer and the chat template of a folder.

    Args:
        folder: with the files of a tokenizer.
        rows: of the embedding; unused ones get placeholders.

    Raises:
        ExportError: llama.cpp would tokenize differently.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("it is not one of the library tokenizers", str(folder))
    content, where = json.loads(backend.to_str()), str(folder)
    words, kinds = _words_of(tokenizer, rows, where)
    found = LlamaCppVocabulary({"token_list": words, "token_types": kinds})
    if content["model"]["type"] == "BPE" and content["model"].get("byte_fallback"):
        _add_pieces(found, content, tokenizer, where)
    elif content["model"]["type"] == "BPE":
        merges = content["model"]["merges"]
        found.fields |= {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": split_rules(content, where),
            "token_merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        }
    else:
        raise refused(f"the tokenizer is of the kind {content['model']['type']}, not BPE", where)
    known, config = tokenizer.get_vocab(), json.loads((folder / "config.json").read_bytes())
    ends = x if isinstance(x := config.get("eos_token_id"), list) else []
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in SPECIAL}
    ids |= {name: known[text] for name, text in TURNS.items() if known.get(text) in ends}
    found.fields |= {name: number for name, number in ids.items() if number is not None}
    found.fields["add_bos_token"] = bool(start_tokens(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        found.fields["chat_template"] = tokenizer.chat_template
    _note_stripping(found, tokenizer)
    return found


def _words_of(tokenizer: Any, rows: int, where: str) -> tuple[list[str], list[gguf.TokenType]]:
    """The text and the type of each token."""
    added, kind = tokenizer.added_tokens_decoder, gguf.TokenType
    # the embedding may have more rows than the tokenizer has tokens
    words, kinds = [f"[PAD{i}]" for i in range(rows)], [kind.UNUSED] * rows
    for word, index in tokenizer.get_vocab().items():
        if index >= rows:
            raise refused(f"token {index} has no row in the embedding of {rows}", where)
        words[index], kinds[index] = word, kind.NORMAL
        if index in added:
            kinds[index] = kind.CONTROL if added[index].special else kind.USER_DEFINED
    return words, kinds


def _add_pieces(
    found: LlamaCppVocabulary, content: dict[str, Any], tokenizer: Any, where: str
) -> None:
    """Add the fields of a SentencePiece tokenizer."""
    words, kinds = found.fields["token_list"], found.fields["token_types"]
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    scores = piece_scores(content, added, where)
    prefix, note = space_rules(content, where)
    byte = re.compile("<0x..>", re.DOTALL)  # <0x0A> for a new line
    for index, word in enumerate(words):
        if index == tokenizer.unk_token_id:
            kinds[index] = gguf.TokenType.UNKNOWN
        elif byte.fullmatch(word) and kinds[index] == gguf.TokenType.NORMAL:
            kinds[index] = gguf.TokenType.BYTE
        elif word in added and set(word) == {SPACE}:
            # Gemma stores runs of spaces; llama.cpp looks for them in the text itself
            words[index] = " " * len(word)
    found.fields |= {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": [scores.get(word, -float(len(scores))) for word in words],
        "add_space_prefix": prefix,
    }
    found.notes += [note] if note else []


def _note_stripping(found: LlamaCppVocabulary, tokenizer: Any) -> None:
    """Note tokens that swallow the spaces around them, which llama.cpp does only for Phi-3."""
    added = tokenizer.added_tokens_decoder.values()
    words = {token.content for token in added}
    behind = {token.content for token in added if token.rstrip}
    found.strips = {"</s>", *NOT_STRIPPING} <= words and behind == words - NOT_STRIPPING
    odd = [t.content for t in added if t.lstrip or (t.rstrip and not found.strips)]
    if odd:
        found.notes.append(
            f"llama.cpp keeps the spaces around special tokens, which the tokenizer takes away "
            f"around {odd[0]!r}"
        )


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
    WORDS + r"\p{N}" + REST: "qwen2",
    MARKS + r"\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
    TEKKEN: "tekken",
}
"""llama.cpp's names for the regular expressions of tokenizers that split by one."""


def split_rules(tokenizer: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the rules by which a byte-level BPE tokenizer splits text.

    Args:
        tokenizer: the content of `tokenizer.json`.
        where: the folder, for errors.

    Raises:
        ExportError: llama.cpp does not know the rules.
    """
    if tokenizer.get("normalizer") not in (None, {"type": "NFC"}):
        raise refused(f"the tokenizer normalises by {tokenizer['normalizer']['type']}", where)
    rules = tokenizer.get("pre_tokenizer") or {"type": "none"}
    steps = rules["pretokenizers"] if rules["type"] == "Sequence" else [rules]
    match [(step["type"], step) for step in steps]:
        case [("ByteLevel", level)] if level.get("use_regex", True):
            return "gpt-2"
        case [("Digits", digits), ("ByteLevel", level)] if level.get("use_regex", True):
            if digits.get("individual_digits"):
                return "smollm"
        case [("Split", split), ("ByteLevel", level)] if not level.get("use_regex", True):
            known = SPLITS.get(split["pattern"].get("Regex", ""))
            if known and split["behavior"] == "Isolated" and not split["invert"]:
                return known
    raise refused(f"its rules for splitting text are {json.dumps(rules)[:200]}", where)


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


def space_rules(tokenizer: dict[str, Any], where: str) -> tuple[bool, str]:
    """Whether a SentencePiece tokenizer puts a space in front of a text, and how llama.cpp differs.

    Args:
        tokenizer: the content of `tokenizer.json`.
        where: the folder, for errors.

    Raises:
        ExportError: llama.cpp cannot do the same.
    """
    normalizer, splits = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if normalizer == {"type": "Sequence", "normalizers": []}:
        normalizer = None
    if normalizer == PREFIXED and splits is None:
        return True, ""
    if normalizer == ESCAPED and (splits is None or splits == NO_SPLIT):
        return False, ""
    if normalizer is None and splits and splits["type"] == "Metaspace" and not splits["split"]:
        scheme = splits["prepend_scheme"]  # transformers' own classes for Llama's tokenizer
        if scheme == "never":
            return False, ""
        note = "a text that begins with a space gets one more in llama.cpp, as in SentencePiece"
        if scheme == "first":
            note += ", and so does the text behind a special token"
        return True, note
    raise refused(f"it treats spaces by {normalizer} and {splits}"[:300], where)


def piece_scores(tokenizer: dict[str, Any], added: set[str], where: str) -> dict[str, float]:
    """The score of each piece by which llama.cpp merges like the list of merges.

    Args:
        tokenizer: the content of `tokenizer.json`.
        added: tokens that are found in the text before it is merged.
        where: the folder, for errors.

    Raises:
        ExportError: there are no such scores, or bytes have no token.
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
        scores.setdefault(piece, -float(len(scores)))  # the earlier in the list, the higher
        last = piece
    # llama.cpp would also merge pairs that are not in the list
    listed, pieces = set(merges), vocabulary.keys() - added
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = left, right = piece[:cut], piece[cut:]
            # single characters are always there; llama.cpp begins with them
            whole = all(len(part) == 1 or part in pieces for part in pair)
            if whole and pair not in listed:
                raise refused(f"{left!r} and {right!r} are never merged to {piece!r}", where)
    return scores
