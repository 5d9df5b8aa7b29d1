"""Byte-level BPE tokenizers: llama.cpp splits text by rules that it knows by name."""

from __future__ import annotations

import json
from typing import Any

from secateur.exporting.gguf.refusals import refused

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
        CheckpointError: llama.cpp does not know the rules.
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
