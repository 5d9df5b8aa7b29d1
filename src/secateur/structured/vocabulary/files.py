"""The files of a tokenizer and the configurations, with new ids.

Ids are given anew in the order of the old ones. So tokens that were added after the vocabulary
stay behind it, as the tokenizers library needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import ArchitectureError, CheckpointError
from secateur.models.header import parse_json
from secateur.structured.vocabulary.pieces import Pieces

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

LEFT_OUT = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "added_tokens.json",
)  # fmt: skip
"""The same vocabulary in older forms, which would contradict the trimmed one."""

OF_IDS = re.compile(r"_token_(id|ids|index|idx)$")
LISTS = (
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "force_words_ids",
)  # fmt: skip
"""Keys of configurations whose values are token ids, beside those that `OF_IDS` finds."""


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
        ArchitectureError: the folder has a tokenizer in another form only.
        CheckpointError: the file is no JSON object.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        raise ArchitectureError(
            f"tokens can only be removed from a {TOKENIZER}, and the folder has none",
            where=str(folder),
            remedy="write one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"it is not JSON: {error}", where=str(file)) from None
    if not isinstance(found, dict):
        raise CheckpointError("it is no JSON object", where=str(file))
    return found


def added_tokens(tokenizer: Mapping[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """The id, the text and whether it is special, for each token that was added."""
    for token in tokenizer.get("added_tokens") or ():
        yield token["id"], token["content"], bool(token.get("special"))


def spoken(folder: Path) -> str:
    """All texts in chat templates and in the tokenizer's configuration, which may hold tokens.

    The list of all added tokens does not count.
    """

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for inner in value.values() if isinstance(value, Mapping) else value:
                yield from texts(inner)

    found = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))]
    for name in (TOKENIZER_CONFIG, "chat_template.json"):
        if (folder / name).is_file():
            told = parse_json((folder / name).read_bytes())
            found += texts({k: v for k, v in told.items() if k != "added_tokens_decoder"})
    return "\0".join(found)


def ids_in(config: Mapping[str, Any]) -> set[int]:
    """All token ids that a configuration names."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    each_id(config, note)
    return found


def each_id(value: Any, change: Any) -> Any:
    """A configuration in which every token id from 0 is replaced by what `change` makes of it."""

    def changed(inner: Any) -> Any:
        if isinstance(inner, bool) or inner is None:
            return inner
        if isinstance(inner, int):
            return change(inner) if inner >= 0 else inner
        return [changed(x) for x in inner] if isinstance(inner, list) else inner

    if isinstance(value, Mapping):
        return {
            key: changed(inner)
            if isinstance(inner, int | list) and (OF_IDS.search(key) or key in LISTS)
            else each_id(inner, change)
            for key, inner in value.items()
        }
    return value


def renumbered_config(
    config: Mapping[str, Any], new: Mapping[int, int], rows: int, count: int
) -> dict[str, Any]:
    """A configuration for the smaller vocabulary.

    Args:
        config: of the model, or of generation.
        new: the new id of each old one that stays.
        rows: the size of the old vocabulary, with rows that no token uses.
        count: the size of the new one.
    """

    def sized(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: count if key == "vocab_size" and inner == rows else sized(inner)
            for key, inner in value.items()
        }

    result: dict[str, Any] = sized(each_id(config, new.__getitem__))
    return result


def renumbered_tokenizer(
    tokenizer: Mapping[str, Any], pieces: Pieces, new: Mapping[int, int]
) -> dict[str, Any]:
    """The content of `tokenizer.json` with the tokens that stay.

    Args:
        tokenizer: the old content.
        pieces: of it.
        new: the new id of each old one that stays.
    """
    kept = {token: new[number] for token, number in pieces.ids.items() if number in new}
    added = [
        {**token, "id": new[token["id"]]}
        for token in tokenizer.get("added_tokens") or ()
        if token["id"] in new
    ]
    result = {**tokenizer, "model": pieces.trimmed(kept), "added_tokens": added}
    result["post_processor"] = renumbered_processor(tokenizer.get("post_processor"), new)
    padding = tokenizer.get("padding")
    if isinstance(padding, Mapping) and padding.get("pad_id") in new:
        result["padding"] = {**padding, "pad_id": new[padding["pad_id"]]}
    return result


def renumbered_processor(processor: Any, new: Mapping[int, int]) -> Any:
    """What adds special tokens to a text, with their new ids."""
    if isinstance(processor, list):
        return [renumbered_processor(inner, new) for inner in processor]
    if not isinstance(processor, Mapping):
        return processor
    result = {key: renumbered_processor(inner, new) for key, inner in processor.items()}
    for key in ("sep", "cls"):  # of BERT and RoBERTa: the token and its id
        if isinstance(processor.get(key), list):
            token, number = processor[key]
            result[key] = [token, new[number]]
    if isinstance(processor.get("ids"), list):
        result["ids"] = [new[number] for number in processor["ids"]]
    return result


def renumbered_tokenizer_config(told: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The content of `tokenizer_config.json` with the tokens that stay."""
    result = dict(told)
    tokens = told.get("added_tokens_decoder")
    if isinstance(tokens, Mapping):
        result["added_tokens_decoder"] = {
            str(new[int(number)]): token for number, token in tokens.items() if int(number) in new
        }
    return result
