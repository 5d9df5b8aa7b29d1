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
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from secateur.errors import RecipeError
from secateur.exporting.gguf.cut_experts import refused
from secateur.exporting.gguf.cut_layers import keys_of_deepseek2, picked
from secateur.exporting.gguf.edit import Edit, written
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.exporting.gguf.tokenizer import SPACE
from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import Field, GGUFSource
from secateur.models.tokenizer import BYTE_TOKENS
from secateur.progress import Progress
from secateur.structured.token_pieces import (
    LongestPieces,
    MergedByScore,
    MergedPieces,
    Pieces,
    ScoredPieces,
    kept_tokens,
)
from secateur.structured.token_texts import (
    ReadText,
    checked_texts,
    counted_texts,
    needs_all,
    tokens_within,
    weighted_shares,
)

_refused = partial(refused, units="tokens")
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_TYPES, _SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"

_TABLES = re.compile(
    r"token_embd\.weight|output\.(weight|bias)|per_layer_token_embd\.weight"
    r"|blk\.\d+\.(nextn\.(embed_tokens|shared_head_head)|ffn_gate_tid2eid)\.weight"
)
"""Tensors with a row for each token."""

_OF_IDS = re.compile(r"(_token_ids?|\.suppress_tokens|\.token_ids_(activate|substitute))$")

_TYPES_THAT_STAY = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)

_TAKEN_FOR_SPECIAL = {"llama": 3, "gpt2": 12, "t5": 3, "bert": 104}
"""llama.cpp takes tokens below these numbers for special ones, where no key says which they are."""


def cut_tokens(source: GGUFSource, edit: Edit, kept: Sequence[int]) -> Edit:
    """Keep some tokens.

    Args:
        source: the file.
        edit: what happens to it.
        kept: the ids that stay, ascending, with all that `tokens_of_text` names.

    Raises:
        ArchitectureError: tokens of this file cannot be cut.
        RecipeError: a token that has to stay would go.
    """
    check_vocabulary(source)
    words = source.fields[_TOKENS].value
    new = {old: number for number, old in enumerate(kept)}
    if lost := _named(source) - new.keys():
        raise _refused_choice(f"a key names token {min(lost)}, which would go", source)
    if not kept or not 0 <= min(kept) <= max(kept) < len(words):
        raise _refused_choice(f"the file has {len(words)} tokens, and others are named", source)
    rows, tensors, changed = tuple(kept), {}, keys_of_deepseek2(source)
    for name, one in edit.tensors.items():
        if table := _TABLES.fullmatch(one.source):
            assert one.replaced is None, "tokens are cut before layers"
        tensors[name] = replace(one, rows=rows) if table else one
    for name, field in source.fields.items():
        if name == _MERGES:
            stay = {words[old] for old in kept}
            changed[name] = field.like([m for m in field.value if _stays(m, stay)])
        elif _OF_IDS.search(name):
            own = [new.get(token, token) for token in _ids(field, name)]
            changed[name] = field.like(own[0] if field.items is None else own)
        elif (
            name.startswith("tokenizer.")
            and field.items is not None
            and len(field.value) == len(words)
        ):
            changed[name] = picked(field, kept)
        elif name == f"{source.architecture}.vocab_size":
            changed[name] = field.like(len(kept))
    return replace(edit, fields={**edit.fields, **changed}, tensors=tensors)


def tokens_of_texts(
    source: GGUFSource,
    read: Sequence[ReadText],
    size: int | float | str | None,
    progress: Progress,
    *,
    multiple: int = 1,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The tokens that texts need, as llama.cpp cuts them.

    The result is checked: a file with the smaller vocabulary and no tensors cuts every document,
    whose tokens all stay, into the same tokens.

    Args:
        source: the file.
        read: the texts.
        size: as `VocabularySize`, the most frequent tokens first; None keeps all of the texts.
        progress: receives the batches.
        multiple: the number of tokens is a multiple of this.

    Returns:
        The ids that stay, ascending, and notes: numbers of tokens and documents, and the share of
        the texts' tokens that stay.

    Raises:
        ArchitectureError: tokens of this file cannot be cut.
        RecipeError: llama.cpp is not installed, all tokens stay, or more have to than the size
            says.
        VerificationError: a document is cut into other tokens.
    """
    pieces = check_vocabulary(source)
    rows = len(source.fields[_TOKENS].value)
    if isinstance(size, str):
        # the texts of tokens leave too, which takes more than the notes of the cut and padding add
        each = sum(x.row_bytes for name, x in source.tensors.items() if _TABLES.fullmatch(name))
        size = tokens_within(size, rows, source.size_bytes, each)
    with _tokenizer(source.file) as old:
        texts = counted_texts(old, read, progress)
        counted = {token for text in texts for token in text.counts}
        always = _staying(source, counted)
        kept = kept_tokens(pieces, weighted_shares(texts), always, size, multiple)
        if len(kept) == rows:
            raise needs_all(rows, str(source.file))
        with tempfile.TemporaryDirectory() as scratch:
            edit = cut_tokens(source, Edit.of(source), kept)
            fields = {x: field for x, field in edit.fields.items() if not x.startswith("split.")}
            smaller = Edit(fields, {})
            [file, *_] = written(source, smaller, Path(scratch) / "vocabulary.gguf")
            with _tokenizer(file) as new:
                notes = checked_texts(old, new, texts, kept, progress)
    return kept, {"tokens_before": rows, "tokens_after": len(kept), **notes}


def _tokenizer(file: Path) -> Any:
    """The tokenizer of a file, as llama.cpp reads it; it is used as one of transformers."""
    return LlamaCpp(file, vocabulary_only=True)


def check_vocabulary(source: GGUFSource) -> Pieces:
    """How the tokens of a file are made.

    Raises:
        ArchitectureError: tokens of this file cannot be cut.
        CheckpointError: the tokenizer contradicts itself.
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
    words = _entries(source, _TOKENS, str)
    _named(source)
    scored = make in (_by_score, _most_probable)
    for name in [x for x in (_SCORES, _TYPES) if x in source.fields or (scored and x == _SCORES)]:
        if len(_entries(source, name, float)) != len(words):
            raise damaged(f"{name} has not {len(words)} entries, one for each token", source.file)
    for name, tensor in source.tensors.items():
        table, has_rows = _TABLES.fullmatch(name), tensor.shape[0] == len(words)
        if bool(table) != has_rows or name.startswith("d2t"):
            raise _refused(
                f"it has {tensor.shape[0]} rows, and the vocabulary has {len(words)} tokens", name
            )
    return make(source, {word: number for number, word in enumerate(words)})


def _merged(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """BPE by a list of merges; of bytes, or with tokens for bytes."""
    by_bytes = source.fields["tokenizer.ggml.model"].value == "gpt2"
    pairs = [_pair_of(merge) for merge in _entries(source, _MERGES, str)]
    model = {"vocab": ids, "merges": pairs, "byte_fallback": True}
    return MergedPieces(model, by_bytes, letters=False)


def _by_score(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """BPE of SentencePiece."""
    return MergedByScore({"vocab": ids, "byte_fallback": True}, source.fields[_SCORES].value)


def _most_probable(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """Unigram. llama.cpp scores an unknown character by the lowest score of a normal piece."""
    scores = source.fields[_SCORES].value
    pairs = zip(source.fields[_TOKENS].value, map(float, scores), strict=True)
    return ScoredPieces({"vocab": [*pairs], "byte_fallback": ids.keys() >= BYTE_TOKENS})


def _longest(source: GGUFSource, ids: Mapping[str, int]) -> Pieces:
    """WordPiece: the longest piece that a word begins with, again and again."""
    return LongestPieces({"vocab": ids, "continuing_subword_prefix": SPACE})


_KINDS: Mapping[str, Callable[[GGUFSource, Mapping[str, int]], Pieces]] = {
    "gpt2": _merged, "gemma4": _merged, "llama": _by_score, "t5": _most_probable, "bert": _longest,
}  # fmt: skip
"""How tokens are made, by `tokenizer.ggml.model`."""


def _staying(source: GGUFSource, counted: Set[int]) -> frozenset[int]:
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
    found |= {token for token in added if words[token] in templates or token in counted}
    found |= _named(source)
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


def _named(source: GGUFSource) -> set[int]:
    """The ids that keys name. llama.cpp ignores one beyond the vocabulary."""
    rows = range(len(source.fields[_TOKENS].value))
    keys = ((name, field) for name, field in source.fields.items() if _OF_IDS.search(name))
    return {token for name, field in keys for token in _ids(field, name) if token in rows}


def _ids(field: Field, name: str) -> list[int]:
    """The ids of a key."""
    found = [field.value] if field.items is None else list(field.value)
    if not all(isinstance(token, int | np.integer) for token in found):
        raise damaged("the key should have ids of tokens", name)
    return [int(token) for token in found]


def _entries(source: GGUFSource, name: str, kind: Any) -> Sequence[Any]:
    """An array of texts or numbers.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    field = source.fields.get(name)
    values = None if field is None or field.items is None else field.value
    if values is None or isinstance(values, list) != (kind is str):
        raise damaged(f"{name} is missing, or not the array that it should be", source.file)
    found: Sequence[Any] = values
    return found


def _refused_choice(what: str, source: GGUFSource) -> RecipeError:
    return RecipeError(
        what, where=str(source.file), remedy="keep the tokens that tokens_of_text returns"
    )
