"""GGUF files written by hand, so that every number in them can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np

U8, U32, BOOL, STRING, ARRAY, U64 = 0, 4, 7, 8, 9, 10
F32, Q4_K = 0, 12


def text(words: str | bytes) -> bytes:
    """A text with its length."""
    content = words.encode() if isinstance(words, str) else words
    return struct.pack("<Q", len(content)) + content


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """A key with its value."""
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    """An array, without its own type."""
    return struct.pack("<IQ", kind, count) + items


def number(value: int) -> bytes:
    """A whole number of 32 bits."""
    return struct.pack("<I", value)


def tensor(name: str, sizes: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor in the header; its innermost size is the first one."""
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


@dataclass(frozen=True)
class Bytes:
    """A file. As it stands it is sound: two keys and three tensors."""

    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    keys: tuple[bytes, ...] = (
        key("general.architecture", STRING, text("qwen3moe")),
        key("qwen3moe.expert_count", U32, number(4)),
    )
    tensors: tuple[bytes, ...] = (
        tensor("blk.0.ffn_up_exps.weight", (256, 2, 4), Q4_K, 0),
        tensor("blk.0.ffn_gate_inp.weight", (8, 4), F32, 1152),
        tensor("output_norm.weight", (8,), F32, 1280),
    )
    data: bytes = field(default=bytes(range(256)) * 5 + bytes(32), repr=False)
    alignment: int = 32

    @property
    def header(self) -> bytes:
        """All before the padding."""
        counts = self.counts or (len(self.tensors), len(self.keys))
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        return head + b"".join([*self.keys, *self.tensors])

    @property
    def content(self) -> bytes:
        """The file."""
        return self.header + bytes(-len(self.header) % self.alignment) + self.data

    def plus(self, *keys: bytes) -> Bytes:
        """With more keys."""
        return replace(self, keys=(*self.keys, *keys))

    def with_tensor(self, place: int, described: bytes) -> Bytes:
        """With another tensor at a place."""
        tensors = list(self.tensors)
        tensors[place] = described
        return replace(self, tensors=tuple(tensors))


SOUND = Bytes()
UP = "blk.0.ffn_up_exps.weight"

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "only magic": b"GGUF",
    "other magic": replace(SOUND, magic=b"GGML").content,
    "version 1": replace(SOUND, version=1).content,
    "version 4": replace(SOUND, version=4).content,
    "big-endian": replace(SOUND, version=3 << 24).content,
    "2^63 tensors": replace(SOUND, counts=(2**63, 2)).content,
    "2^63 keys": replace(SOUND, counts=(3, 2**63)).content,
    "one key too many": replace(SOUND, counts=(3, 3)).content,
    "name of 2^63 bytes": SOUND.plus(struct.pack("<Q", 2**63)).content,
    "name is no UTF-8": SOUND.plus(key(b"\xff\xfe", U32, number(1))).content,
    "text beyond the file": SOUND.plus(key("a", STRING, struct.pack("<Q", 10**6))).content,
    "text is no UTF-8": SOUND.plus(key("a", STRING, text(b"\xc3("))).content,
    "array of 2^61": SOUND.plus(key("a", ARRAY, array(U64, 2**61))).content,
    "array of 2^40 texts": SOUND.plus(key("a", ARRAY, array(STRING, 2**40))).content,
    "array of arrays": SOUND.plus(key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))).content,
    "word is no UTF-8": SOUND.plus(key("a", ARRAY, array(STRING, 1, text(b"\x80")))).content,
    "unknown value": SOUND.plus(key("a", 13, number(1))).content,
    "unknown items": SOUND.plus(key("a", ARRAY, array(99, 1, number(1)))).content,
    "bool of 2": SOUND.plus(key("a", BOOL, b"\2")).content,
    "key twice": SOUND.plus(SOUND.keys[1]).content,
    "alignment 0": SOUND.plus(key("general.alignment", U32, number(0))).content,
    "alignment 24": SOUND.plus(key("general.alignment", U32, number(24))).content,
    "alignment is text": SOUND.plus(key("general.alignment", STRING, text("32"))).content,
    "long name": SOUND.with_tensor(2, tensor("n" * 64, (8,), F32, 1280)).content,
    "tensor twice": SOUND.with_tensor(2, tensor(UP, (8,), F32, 1280)).content,
    "five dimensions": SOUND.with_tensor(2, tensor("n", (8, 1, 1, 1, 1), F32, 1280)).content,
    "no dimension": SOUND.with_tensor(2, tensor("n", (), F32, 1280)).content,
    "2^32 dimensions": SOUND.with_tensor(2, text("n") + number(2**32 - 1)).content,
    "size 0": SOUND.with_tensor(2, tensor("n", (8, 0), F32, 1280)).content,
    "sizes overflow": SOUND.with_tensor(0, tensor(UP, (2**32, 2**32, 2), F32, 0)).content,
    "half a block": SOUND.with_tensor(0, tensor(UP, (128, 2, 4), Q4_K, 0)).content,
    "unknown type": SOUND.with_tensor(0, tensor(UP, (256, 2, 4), 4, 0)).content,
    "type of tomorrow": SOUND.with_tensor(0, tensor(UP, (256, 2, 4), 1000, 0)).content,
    "unaligned": SOUND.with_tensor(2, tensor("n", (4,), F32, 1290)).content,
    "beyond the file": SOUND.with_tensor(2, tensor("n", (8,), F32, 2**40)).content,
    "offset 2^64 - 32": SOUND.with_tensor(2, tensor("n", (8,), F32, 2**64 - 32)).content,
    "overlap": SOUND.with_tensor(2, tensor("n", (8,), F32, 1184)).content,
    "data cut off": SOUND.content[:-1],
    "header cut off": SOUND.content[: len(SOUND.header) - 20],
    "a part alone": SOUND.plus(key("split.count", U32, number(3))).content,
    "parts without number": SOUND.plus(key("split.count", STRING, text("3"))).content,
    "no architecture": replace(SOUND, keys=SOUND.keys[1:]).content,
}
"""Files that every path refuses, by what is wrong with them."""


def written_by_gguf(file: Path, tensors: int = 0) -> Path:
    """A file with values of every type and tensors of every type, by the package `gguf`.

    Args:
        file: to write.
        tensors: of each part; 0 for one file.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "anything", split_max_tensors=tensors)
    kinds = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
    adders: list[Callable[..., None]] = [getattr(writer, f"add_{kind}") for kind in kinds]
    for kind, add in zip(kinds, adders, strict=True):
        add(f"number.{kind}", 7)
    writer.add_float32("number.float32", 1.1)
    writer.add_float64("number.float64", 1.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve ☕")
    writer.add_array("texts", ["a", "", "ß"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.25])
    writer.add_array("switches", [True, False])
    for kind in gguf.GGMLQuantizationType:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (6, 3, 512 // weights * size), np.uint8)
        writer.add_tensor(f"tensor.{kind.name}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
