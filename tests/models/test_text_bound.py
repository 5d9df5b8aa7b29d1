"""A text that is too long is known without reading it, and no text is thought longer than it is."""

from __future__ import annotations

import json
import unicodedata

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers_of_kinds import tokenizer_of

from secateur.models.tokenizer import NFC_SHRINKS, TextBound, text_bound


def with_nfc() -> transformers.PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


KINDS = {
    **{
        kind: transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind))
        for kind in ("bytes", "llama 3", "characters", "unigram")
    },
    "nfc": with_nfc(),
}
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("a \n\t\x04", max_size=60),
    st.text("K\u212a\u1fef\u1fbe\u0308\u0341\u1100\u1161\u11a8", max_size=60),
)


@pytest.mark.parametrize("kind", [*KINDS])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens(kind: str, text: str) -> None:
    bound = text_bound(KINDS[kind])
    assert bound is not None
    ids = KINDS[kind](text, add_special_tokens=False)["input_ids"]
    assert bound.fewest_tokens(text) <= len(ids)


def test_the_bound_is_close_for_the_longest_token() -> None:
    for kind in ("bytes", "unigram"):
        bound = text_bound(KINDS[kind])
        assert bound is not None
        longest = max(KINDS[kind].get_vocab(), key=lambda token: len(token.encode()))
        assert bound == TextBound(len(longest.encode()), b"")
        assert bound.fewest_tokens("x" * 1000) == -(-1000 // bound.longest)


def test_bytes_that_have_no_token_do_not_count() -> None:
    inner = tokenizer_of("bytes")
    stored = json.loads(inner.to_str())
    lost = stored["model"]["vocab"].pop("Ą")  # the byte 4
    stored["model"]["vocab"]["<lost>"] = lost
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(inner).from_str(json.dumps(stored))
    )
    bound = text_bound(tokenizer)
    assert bound is not None
    assert bound.dropped == b"\x04"
    assert bound.fewest_tokens("\x04" * 1000) == 0 == len(tokenizer("\x04" * 1000)["input_ids"])


def test_there_is_no_bound_where_something_is_dropped() -> None:
    assert text_bound(tiny_tokenizer()) is None  # one token for all that it does not know
    lower, split, strips = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Strip()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False)]
    )
    strips.add_tokens([AddedToken("<end>", rstrip=True)])
    for tokenizer in (lower, split, strips):
        assert text_bound(tokenizer) is None
    assert len(strips("<end>" + " " * 500)["input_ids"]) == 1


def test_nfc_shrinks_no_character_more_than_it_is_said_to() -> None:
    """The longest text of each character that NFC makes: the longest forms of all its parts."""
    characters = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    longest: dict[str, int] = {}
    for character in characters:
        parts = unicodedata.normalize("NFD", character)
        if len(parts) == 1:
            longest[parts] = max(longest.get(parts, 0), len(character.encode()))
    shrunk = max(
        sum(longest[part] for part in unicodedata.normalize("NFD", character))
        / len(character.encode())
        for character in characters
        if unicodedata.normalize("NFC", character) == character
    )
    assert shrunk == 3.5 < NFC_SHRINKS
