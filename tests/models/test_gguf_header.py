"""The header of a GGUF file, against files that the gguf package writes, whole and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf_example import write_gguf

from secateur.errors import CheckpointError
from secateur.models.header import GgufArray, read_gguf_header


def test_what_the_header_says(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    header = read_gguf_header(file)
    assert header.version == 3
    assert header.file_bytes == file.stat().st_size
    assert header.metadata["general.name"] == "a small one"
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    assert header.metadata["general.languages"] == ["en", "de"]
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray("string", 40)
    found = {x.name: x for x in header.tensors}
    assert list(found) == [
        "token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_norm.weight",
        "blk.1.attn_q.weight", "blk.1.attn_norm.weight",
    ]  # fmt: skip
    q = found["blk.1.attn_q.weight"]
    assert (q.type, q.shape, q.parameters) == ("Q8_0", (32, 64), 2048)
    assert q.size_bytes == 2048 // 32 * 34
    norm = found["blk.0.attn_norm.weight"]
    assert (norm.type, norm.shape, norm.size_bytes) == ("F32", (64,), 256)
    content = file.read_bytes()[norm.offset : norm.offset + norm.size_bytes]
    assert struct.unpack("<64f", content) == (1.0,) * 64


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    for length in (0, 3, 8, 20, 100, 500, len(whole) - 200):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be read") as raised:
            read_gguf_header(tmp_path / "cut.gguf")
        assert raised.value.where == str(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("place", "form", "value", "message"),
    [
        (0, "<I", 0, "it begins with"),
        (4, "<I", 9, "version 9"),
        (8, "<Q", 2**60, "do not fit the file"),
        (16, "<Q", 2**60, "do not fit the file"),
        (24, "<Q", 2**62, "it ends within"),  # the length of the first key
        (24, "<Q", 2**64 - 1, "it ends within"),
    ],
)
def test_numbers_that_lie(tmp_path: Path, place: int, form: str, value: int, message: str) -> None:
    content = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    struct.pack_into(form, content, place, value)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_gguf_header(tmp_path / "m.gguf")


def test_every_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    end = read_gguf_header(tmp_path / "m.gguf").tensors[0].offset
    for place in range(0, end, 3):
        content = bytearray(whole)
        content[place] ^= 0xFF
        (tmp_path / "m.gguf").write_bytes(content)
        try:
            header = read_gguf_header(tmp_path / "m.gguf")
        except CheckpointError:
            continue
        assert all(x.offset + x.size_bytes <= len(whole) for x in header.tensors)
