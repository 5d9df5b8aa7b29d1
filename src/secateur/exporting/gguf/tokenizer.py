"""Tokenizers of transformers as the fields of a GGUF file.

llama.cpp knows two kinds: byte-level BPE with rules that it has names for, and SentencePiece with a
score for each piece. A tokenizer that it would not follow exactly is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from secateur.exporting.gguf.byte_level import split_rules
from secateur.exporting.gguf.refusals import refused
from secateur.exporting.gguf.sentencepiece import (
    SPACE,
    is_sentencepiece,
    piece_scores,
    space_rules,
)
from secateur.models.tokenizer import load_tokenizer, start_tokens

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

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

    def add_fields(self, writer: gguf.GGUFWriter) -> None:
        """Write the tokenizer."""
        for name, value in self.fields.items():
            getattr(writer, f"add_{name}")(value)


def read_vocabulary(folder: Path, rows: int) -> LlamaCppVocabulary:
    """The tokenizer and the chat template of a folder.

    Args:
        folder: with the files of a tokenizer.
        rows: of the embedding; unused ones get placeholders.

    Raises:
        CheckpointError: llama.cpp would tokenize differently.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("it is not one of the library tokenizers", str(folder))
    content, where = json.loads(backend.to_str()), str(folder)
    words, kinds = words_of(tokenizer, rows, where)
    found = LlamaCppVocabulary({"token_list": words, "token_types": kinds})
    if is_sentencepiece(content):
        add_pieces(found, content, tokenizer, where)
    elif content["model"]["type"] == "BPE":
        merges = content["model"]["merges"]
        found.fields |= {
            "tokenizer_model": "gpt2",
            "tokenizer_pre": split_rules(content, where),
            "token_merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        }
    else:
        raise refused(f"the tokenizer is of the kind {content['model']['type']}, not BPE", where)
    for name in SPECIAL:
        special_id: int | None = getattr(tokenizer, f"{name}_id", None)
        if special_id is not None:
            found.fields[f"{name}_id"] = special_id
    found.fields["add_bos_token"] = bool(start_tokens(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        found.fields["chat_template"] = tokenizer.chat_template
    note_stripping(found, tokenizer)
    return found


def words_of(tokenizer: Any, rows: int, where: str) -> tuple[list[str], list[gguf.TokenType]]:
    """The text and the type of each token."""
    added = tokenizer.added_tokens_decoder
    words, kinds = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    for word, index in tokenizer.get_vocab().items():
        if index >= rows:
            raise refused(f"token {index} has no row in the embedding of {rows}", where)
        kind = gguf.TokenType.NORMAL
        if index in added:
            special = added[index].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        words[index], kinds[index] = word, kind
    return words, kinds


def add_pieces(
    found: LlamaCppVocabulary, content: dict[str, Any], tokenizer: Any, where: str
) -> None:
    """Add the fields of a SentencePiece tokenizer."""
    words, kinds = found.fields["token_list"], found.fields["token_types"]
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    scores, spaces = piece_scores(content, added, where), space_rules(content, where)
    for index, word in enumerate(words):
        if index == tokenizer.unk_token_id:
            kinds[index] = gguf.TokenType.UNKNOWN
        elif kinds[index] == gguf.TokenType.NORMAL and is_byte(word):
            kinds[index] = gguf.TokenType.BYTE
        elif word in added and set(word) == {SPACE}:
            # Gemma stores runs of spaces; llama.cpp looks for them in the text itself
            words[index] = " " * len(word)
    found.fields |= {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": [scores.get(word, -float(len(scores))) for word in words],
        "add_space_prefix": spaces.prefix,
    }
    if spaces.note:
        found.notes.append(spaces.note)


def is_byte(word: str) -> bool:
    """Whether a token stands for a byte."""
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def note_stripping(found: LlamaCppVocabulary, tokenizer: Any) -> None:
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
