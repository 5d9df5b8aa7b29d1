"""Tokenizers of transformers as the fields of a GGUF file.

llama.cpp splits text by rules that it knows by name. The rules of a `tokenizer.json` are compared
with those, and a tokenizer with other rules is refused: it would give other tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from secateur.errors import CheckpointError
from secateur.models.tokenizer import load_tokenizer, start_tokens

__all__ = ["add_tokenizer", "split_rules"]

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

SPECIAL = {
    "bos_token": "add_bos_token_id",
    "eos_token": "add_eos_token_id",
    "unk_token": "add_unk_token_id",
    "pad_token": "add_pad_token_id",
}


def split_rules(tokenizer: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the rules by which a byte-level BPE tokenizer splits text.

    Args:
        tokenizer: the content of `tokenizer.json`.
        where: the file, for errors.

    Raises:
        CheckpointError: llama.cpp does not know this kind of tokenizer, or its rules.
    """
    if tokenizer["model"]["type"] != "BPE" or tokenizer["model"].get("byte_fallback"):
        kind = tokenizer["model"]["type"]
        fallback = " with byte fallback" if tokenizer["model"].get("byte_fallback") else ""
        raise refused(f"the tokenizer is of the kind {kind}{fallback}, not byte-level BPE", where)
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


def refused(why: str, where: str) -> CheckpointError:
    """The error for a tokenizer that a GGUF file cannot describe."""
    return CheckpointError(
        f"llama.cpp would not tokenize like this model: {why}",
        where=where,
        remedy="export to another target; to try it all the same, use llama.cpp's own converter",
    )


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Add the tokenizer and the chat template of a folder.

    Args:
        writer: the file.
        folder: with `tokenizer.json`.
        vocabulary: the rows of the embedding; unused rows get placeholders.

    Raises:
        CheckpointError: the tokenizer cannot be expressed.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise refused("it has no tokenizer.json", str(folder))
    content = json.loads(file.read_text(encoding="utf-8"))
    rules = split_rules(content, str(file))
    tokenizer = load_tokenizer(folder)
    added = tokenizer.added_tokens_decoder
    words, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [gguf.TokenType.UNUSED] * vocabulary
    for word, index in tokenizer.get_vocab().items():
        if index >= vocabulary:
            raise refused(f"token {index} has no row in the embedding of {vocabulary}", str(file))
        kind = gguf.TokenType.NORMAL
        if index in added:
            special = added[index].special
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        words[index], kinds[index] = word, kind
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name, add in SPECIAL.items():
        special_id: int | None = getattr(tokenizer, f"{name}_id", None)
        if special_id is not None:
            getattr(writer, add)(special_id)
    writer.add_add_bos_token(bool(start_tokens(tokenizer)))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
