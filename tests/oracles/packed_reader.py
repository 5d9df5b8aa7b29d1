"""A reader of compressed checkpoints, written from docs/format.md: slow, and none of our code."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path

import zstandard

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}


def number(raw: bytes, dtype: str) -> float:
    """One element."""
    if dtype == "BF16":
        return struct.unpack("<f", b"\0\0" + raw)[0]
    return struct.unpack({"F32": "<f", "F16": "<e", "I8": "<b", "U8": "<B"}[dtype], raw)[0]


def read_file(file: Path) -> tuple[dict, dict[str, tuple[str, list[int], bytes]]]:
    """The description; and dtype, shape and bytes of every tensor, decoded."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    description = json.loads(header.pop("__metadata__")["secateur"])
    covered = {key: value for key, value in description.items() if key != "digest"}
    covered["tensors"] = {n: [e["dtype"], e["shape"]] for n, e in header.items()}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    assert description["digest"] == f"{zlib.crc32(text.encode()):08x}"
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + x for x in entry["data_offsets"])
        data = raw[start:end]
        assert description["checksums"][name] == f"{zlib.crc32(data):08x}"
        dtype, shape = entry["dtype"], entry["shape"]
        if name in description["archived"]:
            archived = description["archived"][name]
            dtype, shape, codec = archived["dtype"], archived["shape"], archived["codec"]
            if codec != "none":
                data = zstandard.ZstdDecompressor().decompress(data)
            if codec.startswith("zstd-"):
                data = narrow(data, int(codec[5:]), shape[-1])
            size, planes = BYTES[dtype], data
            count = len(planes) // size
            data = bytes(planes[p * count + i] for i in range(count) for p in range(size))
        tensors[name] = (dtype, shape, data)
    return description, tensors


def narrow(data: bytes, width: int, length: int) -> bytes:
    """Rows of `length` bytes, from rows whose numbers have 4 or 8 bits instead of `width`."""
    count = math.ceil(8 * length / width)
    wide = 4 if width == 3 else 8
    row_bytes = math.ceil(count * wide / 8)
    rows = b""
    for start in range(0, len(data), row_bytes):
        whole = int.from_bytes(data[start : start + row_bytes], "little")
        numbers = [whole >> (n * wide) & (2**wide - 1) for n in range(count)]
        packed = sum(number << (n * width) for n, number in enumerate(numbers))
        rows += packed.to_bytes(length + 1, "little")[:length]
    return rows


def bit(data: bytes, row_bytes: int, row: int, place: int) -> int:
    """One bit of a row, counted from the lowest of its first byte."""
    return data[row * row_bytes + place // 8] >> (place % 8) & 1


def positions(rank: int, kept: int, group: int) -> list[int]:
    """The kept positions of a group."""
    found = []
    for position in reversed(range(group)):
        if kept > 0 and rank >= math.comb(position, kept):
            found.append(position)
            rank -= math.comb(position, kept)
            kept -= 1
    return found[::-1]


def stream(data: bytes, bits: int, start: int, count: int) -> list[int]:
    """Numbers of a bit stream that begins at a byte, in two's complement."""
    found = []
    for n in range(count):
        places = range(n * bits, (n + 1) * bits)
        plain = sum((data[start + p // 8] >> p % 8 & 1) << k for k, p in enumerate(places))
        found.append(plain - 2**bits if plain >= 2 ** (bits - 1) else plain)
    return found


def stored_values(layout: dict, part: tuple[str, list[int], bytes], count: int) -> list[float]:
    """The values of a matrix in their order, `count` of them."""
    dtype, _, data = part
    if "group" not in layout:
        size = BYTES[dtype]
        return [number(data[k * size : (k + 1) * size], dtype) for k in range(count)]
    bits, (out, columns) = int(layout["values"][3:]), layout["shape"]
    if layout["format"] != "dense":
        return stream(data, bits, 0, count)
    width = math.ceil(columns * bits / 8)
    return [q for i in range(out) for q in stream(data, bits, i * width, columns)]


def scale_of_byte(byte: int, exponent: float) -> float:
    """The scale of a group, of its byte and the exponent of its row."""
    sign, c = divmod(byte, 128)
    return (-1) ** sign * 2.0 ** (exponent + c // 16) * (1 + c % 16 / 16)


def scale_of(layout: dict, parts: dict, i: int, j: int) -> float:
    """What a value of row i and column j is multiplied with."""
    if "group" in layout:
        groups = math.ceil(layout["shape"][1] / layout["group"])
        c = parts["weight_scale"][2][i * groups + j // layout["group"]]
        e = number(parts["weight_exponent"][2][i : i + 1], "I8")
        return scale_of_byte(c, e)
    if layout["values"] == "int8":
        return number(parts["weight_scale"][2][4 * i : 4 * i + 4], "F32")
    return 1.0


def kept_places(layout: dict, parts: dict) -> list[tuple[int, int]]:
    """The places of the stored values, in their order."""
    out, columns = layout["shape"]
    if layout["format"] == "dense":
        return [(i, j) for i in range(out) for j in range(columns)]
    if layout["format"] == "bitmask":
        data, width = parts["bitmask"][2], math.ceil(columns / 8)
        return [(i, j) for i in range(out) for j in range(columns) if bit(data, width, i, j)]
    kept, group = map(int, layout["pattern"].split(":"))
    bits = math.ceil(math.log2(math.comb(group, kept)))
    data, width = parts["codes"][2], math.ceil(columns // group * bits / 8)
    places = []
    for i in range(out):
        for g in range(columns // group):
            rank = sum(bit(data, width, i, g * bits + k) << k for k in range(bits))
            places += [(i, g * group + p) for p in positions(rank, kept, group)]
    return places


def read_matrices(file: Path) -> dict[str, list[list[float]]]:
    """Every packed matrix of a file, [out][in]."""
    description, tensors = read_file(file)
    matrices = {}
    for name, layout in description["layouts"].items():
        parts = {n[len(name) + 1 :]: t for n, t in tensors.items() if n.startswith(name + ".")}
        part = parts["weight" if layout["format"] == "dense" else "compressed"]
        places = kept_places(layout, parts)
        values = stored_values(layout, part, len(places))
        matrix = [[0.0] * layout["shape"][1] for _ in range(layout["shape"][0])]
        for (i, j), value in zip(places, values, strict=True):
            matrix[i][j] = value * scale_of(layout, parts, i, j)
        matrices[name] = matrix
    return matrices
