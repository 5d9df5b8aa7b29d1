"""Tiny real tokenizers of every kind, trained in a second on the sources of Python itself."""

from __future__ import annotations

import argparse
import inspect
import json
import random
import textwrap
from pathlib import Path
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
OF_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Tokens that transformers adds to a tokenizer of BERT without them."""


def documents() -> list[str]:
    """Texts: the sources of two modules, in pieces."""
    text = inspect.getsource(argparse) + inspect.getsource(textwrap)
    return [text[start : start + 1500] for start in range(0, len(text), 1500)]


def tokenizer_of(kind: str, size: int = 700) -> Tokenizer:
    """A tokenizer of a kind: that of Llama 3, CLIP, XLM-R or BERT, and others by their model."""
    if kind.startswith("unigram"):
        return unigram(size, by_bytes=kind == "unigram")
    if kind in ("bert", "words"):
        return of_words(kind, size)
    if kind == "characters":
        return with_characters(size)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    special = [] if kind == "llama 3" else SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **({"end_of_word_suffix": "</w>"} if kind == "clip" else {}),
    )  # fmt: skip
    inner.train_from_iterator(documents(), trainer)
    if kind == "llama 3":  # tokens are added behind the vocabulary, and words are looked up whole
        description = json.loads(inner.to_str())
        description["model"]["ignore_merges"] = True
        inner = Tokenizer.from_str(json.dumps(description))
        inner.add_special_tokens(SPECIAL)
        inner.add_tokens(["<tool>", "<unused0>"])
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return inner


def with_characters(size: int) -> Tokenizer:
    """As Llama 2 and Mistral: BPE over characters, with bytes for those that are not known."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(
        documents(),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False
        ),
    )
    description = json.loads(trained.to_str())
    description["added_tokens"] = description["added_tokens"][
        : len(SPECIAL)
    ]  # bytes are ordinary tokens
    inner = Tokenizer.from_str(json.dumps(description))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return inner


def of_words(kind: str, size: int) -> Tokenizer:
    """WordPiece as BERT has it, or whole words."""
    options: dict[str, Any] = {
        "vocab_size": size, "special_tokens": SPECIAL, "show_progress": False
    }  # fmt: skip
    if kind == "words":
        inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.train_from_iterator(documents(), trainers.WordLevelTrainer(**options))
        return inner
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options["special_tokens"] = [*SPECIAL, *OF_BERT]
    inner.train_from_iterator(documents(), trainers.WordPieceTrainer(**options))
    inner.decoder = decoders.WordPiece()
    ends = [(token, inner.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    inner.post_processor = processors.BertProcessing(*ends)
    return inner


def unigram(size: int, by_bytes: bool = True) -> Tokenizer:
    """A Unigram model, with bytes for what it does not know or with one token for all that."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(documents(), trainer)
    description = json.loads(inner.to_str())
    vocab = description["model"]["vocab"]
    if by_bytes:
        vocab[3:3] = [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
    description["model"] |= {"byte_fallback": by_bytes, "unk_id": 0}
    inner = Tokenizer.from_str(json.dumps(description))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return inner


def save_tokenizer(folder: Path, kind: str, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """Write a tokenizer of a kind to a folder."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(kind), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        **options,
    )  # fmt: skip
    if kind == "llama 3":
        tokenizer.chat_template = "{{ '<tool>' }}{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of random characters of all of Unicode, without halves of pairs."""
    pick = random.Random(seed)
    ranges = [(32, 127), (160, 0x250), (0x370, 0xD800), (0xE000, 0xFFFE), (0x10000, 0x110000)]
    return [
        "".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(pick.randint(1, 40)))
        for _ in range(count)
    ]


__all__ = [
    "SPECIAL",
    "AddedToken",
    "documents",
    "random_texts",
    "save_tokenizer",
    "tokenizer_of",
]
