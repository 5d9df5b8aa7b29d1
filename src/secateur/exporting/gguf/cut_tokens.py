"""Tokens that leave a GGUF file: rows of the tables, entries of the tokenizer, ids given anew.

llama.cpp makes tokens by its own rules: byte-level BPE by a list of merges, SentencePiece's BPE by
the scores of its pieces, Unigram by the most probable way. `structured.token_pieces` says for each
which other tokens a token needs. Ids are given anew in the order of the old ones.

A token stays if the text has it, if another one needs it, if it is a byte, a control token or the
unknown token, if a key names its id or the chat template its text, and if llama.cpp takes its
number for a special token where no key names one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from secateur.calibration.chats import Document
from secateur.errors import ArchitectureError, RecipeError
from secateur.exporting.gguf.edit import Edit, written
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.gguf_file import Field, GGUFSource
from secateur.models.tokenizer import BYTE_TOKENS
from secateur.progress import Progress
from secateur.structured.token_pieces import (
    MergedByScore,
    MergedPieces,
    Pieces,
    ScoredPieces,
    kept_tokens,
)
from secateur.structured.vocabulary import check_tokens, token_counts

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_TYPES, _SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"

_TABLES = re.compile(
    r"token_embd\.weight|output\.(weight|bias)|per_layer_token_embd\.weight"
    r"|blk\.\d+\.(nextn\.(embed_tokens|shared_head_head)|ffn_gate_tid2eid)\.weight"
)
"""Tensors with a row for each token."""

_OF_IDS = re.compile(r"(_token_ids?|\.suppress_tokens|\.token_ids_(activate|substitute))$")

_TYPES_THAT_STAY = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)

_TAKEN_FOR_SPECIAL = {"llama": 3, "gpt2": 12, "t5": 3}
"""llama.cpp takes tokens below these numbers for special ones, where no key says which they are."""


def cut_tokens(source: GGUFSource, edit: Edit, kept: Sequence[int]) -> Edit:
    """Keep some tokens.

    Args:
        source: the file.
        edit: what happens to it.
        kept: the ids that stay, ascending, with all that `tokens_of_text` names.

    Raises:
        ArchitectureError: tokens of this file cannot be cut.
    """
    check_vocabulary(source)
    words = source.fields[_TOKENS].value
    new = {old: number for number, old in enumerate(kept)}
    rows, tensors = tuple(kept), {}
    for name, one in edit.tensors.items():
        if table := _TABLES.fullmatch(one.source):
            assert one.replaced is None, "tokens are cut before layers"
        tensors[name] = replace(one, rows=rows) if table else one
    changed = {}
    for name, field in source.fields.items():
        if name == _MERGES:
            stay = {words[old] for old in kept}
            changed[name] = field.like([m for m in field.value if _stays(m, stay)])
        elif _OF_IDS.search(name):
            changed[name] = field.like(_renumbered(field, new, len(words)))
        elif name.startswith("tokenizer.") and _has_entries(field, len(words)):
            values = field.value
            picked = values[list(kept)] if isinstance(values, np.ndarray) else None
            changed[name] = field.like([values[i] for i in kept] if picked is None else picked)
        elif name == f"{source.architecture}.vocab_size":
            changed[name] = field.like(len(kept))
    return replace(edit, fields={**edit.fields, **changed}, tensors=tensors)


def tokens_of_text(
    source: GGUFSource, documents: Sequence[Document], size: int | None, progress: Progress
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The tokens that a text needs, as llama.cpp cuts it.

    The result is checked: a file with the smaller vocabulary and no tensors cuts every document,
    whose tokens all stay, into the same tokens.

    Args:
        source: the file.
        documents: the text.
        size: keep at most this number, the most frequent ones first; None keeps all of the text.
        progress: receives the batches.

    Returns:
        The ids that stay, ascending, and notes: numbers of tokens and documents, and the share of
        the text's tokens that stay.

    Raises:
        ArchitectureError: tokens of this file cannot be cut.
        RecipeError: llama.cpp is not installed, all tokens stay, or more have to than `size`.
        VerificationError: a document is cut into other tokens.
    """
    pieces = check_vocabulary(source)
    rows = len(source.fields[_TOKENS].value)
    with _tokenizer(source.file) as old:
        counts = token_counts(old, documents, progress)
        kept = kept_tokens(pieces, counts, _staying(source, counts), size)
        if len(kept) == rows:
            raise RecipeError(
                f"the text needs all {rows} tokens",
                where=str(source.file),
                remedy="give --vocabulary-size, or a text that needs fewer",
            )
        with tempfile.TemporaryDirectory() as scratch:
            edit = cut_tokens(source, Edit.of(source), kept)
            fields = {x: field for x, field in edit.fields.items() if not x.startswith("split.")}
            smaller = Edit(fields, {})
            [file, *_] = written(source, smaller, Path(scratch) / "vocabulary.gguf")
            with _tokenizer(file) as new:
                same = check_tokens(old, new, documents, kept, progress)
    total = sum(counts.values())
    return kept, {
        "tokens_before": rows,
        "tokens_after": len(kept),
        "documents": len(documents),
        "same_documents": same,
        "covered": sum(counts[token] for token in kept) / total if total else 1.0,
    }


def _tokenizer(file: Path) -> Any:
    """The tokenizer of a file, as llama.cpp reads it; it is used as one of transformers."""
    return LlamaCpp(file, vocabulary_only=True)


def check_vocabulary(source: GGUFSource) -> Pieces:
    """How the tokens of a file are made.

    Raises:
        ArchitectureError: tokens of this file cannot be cut.
    """
    model = source.fields.get("tokenizer.ggml.model")
    kind = "none" if model is None or _TOKENS not in source.fields else str(model.value)
    make = _KINDS.get(kind)
    if make is None:
        raise _refused(
            f"tokens of the tokenizer {kind!r} cannot be removed", "tokenizer.ggml.model"
        )
    for name in ("tokenizer.huggingface.json", "tokenizer.rwkv.world"):
        if name in source.fields:
            raise _refused("the file has its vocabulary in a second form", name)
    words = source.fields[_TOKENS].value
    for name, tensor in source.tensors.items():
        table, has_rows = _TABLES.fullmatch(name), tensor.shape[0] == len(words)
        if bool(table) != has_rows or name.startswith("d2t"):
            raise _refused(
                f"it has {tensor.shape[0]} rows, and the vocabulary has {len(words)} tokens", name
            )
    return make(source, {word: number for number, word in enumerate(words)})


def _merged(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """BPE by a list of merges; of bytes, or with tokens for bytes."""
    merges = source.fields.get(_MERGES)
    if merges is None:
        raise _refused("the file has no merges", _MERGES)
    by_bytes = source.fields["tokenizer.ggml.model"].value == "gpt2"
    pairs = [_pair_of(merge) for merge in merges.value]
    return MergedPieces({"vocab": ids, "merges": pairs, "byte_fallback": True}, by_bytes)


def _by_score(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """BPE of SentencePiece."""
    return MergedByScore({"vocab": ids, "byte_fallback": True}, source.fields[_SCORES].value)


def _most_probable(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """Unigram. llama.cpp scores an unknown character by the lowest score of a normal piece."""
    scores = source.fields[_SCORES].value
    pairs = zip(source.fields[_TOKENS].value, map(float, scores), strict=True)
    return ScoredPieces({"vocab": [*pairs], "byte_fallback": ids.keys() >= BYTE_TOKENS})


_KINDS: Mapping[str, Callable[[GGUFSource, Mapping[str, int]], Pieces]] = {
    "gpt2": _merged, "gemma4": _merged, "llama": _by_score, "t5": _most_probable,
}  # fmt: skip
"""How tokens are made, by `tokenizer.ggml.model`."""


def _staying(source: GGUFSource, counts: Mapping[int, int]) -> frozenset[int]:
    """Ids that stay whatever the text has."""
    words, fields = source.fields[_TOKENS].value, source.fields
    types = fields[_TYPES].value if _TYPES in fields else ()
    model = str(fields["tokenizer.ggml.model"].value)
    found = {token for token, kind in enumerate(types) if kind in _TYPES_THAT_STAY}
    found |= {*range(min(_TAKEN_FOR_SPECIAL.get(model, 0), len(words)))}
    templates = "".join(
        str(field.value) for name, field in fields.items() if "chat_template" in name
    )
    added = (token for token, kind in enumerate(types) if kind == TokenType.USER_DEFINED)
    found |= {token for token in added if words[token] in templates or counts.get(token)}
    for name, field in fields.items():
        if _OF_IDS.search(name):
            values = [field.value] if field.items is None else field.value
            found |= {int(token) for token in values if 0 <= token < len(words)}
    if model == "t5":
        normal = [n for n, kind in enumerate(types) if kind == TokenType.NORMAL]
        found |= {min(normal, key=lambda token: fields[_SCORES].value[token])}
    return frozenset(found)


def _pair_of(merge: str) -> tuple[str, str]:
    """The two parts of a merge, as llama.cpp divides them: at the first space behind a letter."""
    place = merge.find(" ", 1)
    return merge[:place], merge[place + 1 :]


def _stays(merge: str, words: set[str]) -> bool:
    first, second = _pair_of(merge)
    return first in words and second in words and first + second in words


def _has_entries(field: Field, count: int) -> bool:
    """Whether an array has one for each token."""
    return field.items is not None and len(field.value) == count


def _renumbered(field: Field, new: Mapping[int, int], rows: int) -> Any:
    """An id, or several, given anew. llama.cpp ignores an id beyond the vocabulary."""
    if field.items is not None:
        return [new[int(token)] if int(token) < rows else int(token) for token in field.value]
    return new[int(field.value)] if 0 <= int(field.value) < rows else int(field.value)


def _refused(what: str, where: str) -> ArchitectureError:
    return ArchitectureError(what, where=where, remedy="leave the vocabulary of this file as it is")
