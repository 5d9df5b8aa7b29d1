"""Text from tokens: pieces add up, characters are whole, stop texts are never begun."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_tokenizer

from secateur.runtime.sampling import TextStream

BYTES = byte_tokenizer()
STOPS = st.lists(st.sampled_from(["xy", "yz", "€x", "zzz"]))


def metaspace_tokenizer():
    """Words that begin with a mark for a space, which is not written at the start of a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁a", "▁b", "c", "▁", "▁the"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


METASPACE = metaspace_tokenizer()


def pieces_of(tokenizer, tokens: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, stop, pieces.append)
    for token in tokens:
        if not stream.add(token):
            break
    stream.finish()
    return pieces, stream


def bytes_of(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("aé€😀 xyz\n"), max_size=40),
    st.lists(st.sampled_from(["xy", "yz", "€x", "zzz"])),
)
def test_pieces_are_whole_characters_and_end_before_a_stop_text(text: str, stop: list[str]) -> None:
    """Every byte is a token. The oracle looks at the whole text at once."""
    pieces, stream = pieces_of(BYTES, bytes_of(text), stop)
    places = [text.index(s) for s in stop if s in text]
    expected = text[: min(places)] if places else text
    assert "".join(pieces) == stream.text == expected
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_are_what_the_tokenizer_makes_of_them(tokens: list[int]) -> None:
    pieces, _ = pieces_of(BYTES, tokens, [])
    assert "".join(pieces) == BYTES.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
@example([1, 0, 0, 0, 0, 0, 0, 1])  # special tokens, longer than what is decoded again
def test_spaces_at_the_start_of_a_text_only(tokens: list[int]) -> None:
    pieces, _ = pieces_of(METASPACE, tokens, [])
    assert "".join(pieces) == METASPACE.decode(tokens, skip_special_tokens=True)


def test_a_stop_text_that_begins_is_held_back() -> None:
    tokenizer = tiny_tokenizer()
    pieces: list[str] = []
    stream = TextStream(tokenizer, ["xyz"], pieces.append)
    for token in tokenizer("axyb", add_special_tokens=False)["input_ids"]:
        assert stream.add(token)
    assert pieces == ["a", "xyb"]
    for token in tokenizer("xy", add_special_tokens=False)["input_ids"]:
        stream.add(token)
    assert pieces == ["a", "xyb"]
    stream.finish()
    assert pieces == ["a", "xyb", "xy"]


def test_a_character_comes_with_its_last_byte() -> None:
    pieces: list[str] = []
    stream = TextStream(BYTES, [], pieces.append)
    seen = []
    for token in bytes_of("é😀"):
        stream.add(token)
        seen.append("".join(pieces))
    assert seen == ["", "é", "é", "é", "é", "é😀"]


def test_a_stop_text_of_one_half_character_waits_and_ends() -> None:
    pieces, stream = pieces_of(BYTES, bytes_of("ab😀cd"), ["😀"])
    assert pieces == ["a", "b"]
    assert stream.stopped


@pytest.mark.parametrize("length", [50, 400])
def test_the_work_for_a_token_does_not_grow(length: int, monkeypatch) -> None:
    longest = 0
    decode = type(BYTES).decode

    def watched(self, tokens, **options):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(self, tokens, **options)

    monkeypatch.setattr(type(BYTES), "decode", watched)
    pieces_of(BYTES, bytes_of("abcdé" * length), ["zz"])
    assert longest <= 12
