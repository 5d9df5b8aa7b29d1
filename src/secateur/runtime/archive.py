"""The archive stores every larger tensor as byte planes, compressed with zstandard.

A plane has the first bytes of all elements, the next the second bytes, and so on. Exponents of
weights are much alike and mantissas are not, so they compress better apart. Numbers of 3, 5, 6 or
7 bits are first widened, because zstandard counts bytes: in a bit stream most bytes hold pieces of
several numbers. Archives are lossless, and meant for storage and transfer; a runtime unpacks them
when it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import zstandard
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.checkpoint import as_bytes, dtype_name
from secateur.models.header import DTYPES, MAX_DIMENSIONS, MAX_SIDE, is_counts
from secateur.runtime.formats import PartSpec
from secateur.runtime.formats.bits import pack_numbers, padding_bits, row_bytes, unpack_numbers

SMALLEST_BYTES = 1024
"""Tensors up to this size are not compressed."""

LEVEL = 9
"""The level of zstandard: 1 to 2 % smaller than level 3 on packed weights, equally fast to read."""

LEVEL_OF_NUMBERS = 1
"""The level for widened numbers. They repeat by chance only, and higher levels write each short
repetition at more bits than it saves: level 9 is 5 % larger."""

MOST_EXPANSION = 1024
"""A frame that grows by more is refused, so a small file cannot use up all memory."""

ALWAYS_BELIEVED_BYTES = 16 * 2**20

WIDENED = {"zstd-3": 3, "zstd-5": 5, "zstd-6": 6, "zstd-7": 7}
"""The codecs for bit streams whose numbers straddle bytes, and the bits of these numbers."""

CODECS = ("zstd", "none", *WIDENED)


@dataclass(frozen=True)
class Archived:
    """The tensor that stored bytes decode to.

    Attributes:
        spec: dtype and shape of the tensor.
        codec: `zstd`: a frame of the byte planes; `none`: the byte planes uncompressed;
            `zstd-3` and the others of `WIDENED`: a frame of numbers of so many bits, widened.
    """

    spec: PartSpec
    codec: str

    def to_json(self) -> dict[str, Any]:
        """For the metadata of a file."""
        dtype, shape = dtype_name(self.spec.dtype), list(self.spec.shape)
        return {"dtype": dtype, "shape": shape, "codec": self.codec}


def archived_spec(entry: Any, stored: PartSpec) -> Archived:
    """Read the result of `to_json`, and check it against the stored bytes.

    Raises:
        CheckpointError: a key is missing or of the wrong kind, or the decoded size is larger than
            `MOST_EXPANSION` allows.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "codec"}:
        raise CheckpointError("an archived tensor has the keys dtype, shape and codec")
    shape = entry["shape"]
    if not is_counts(shape) or len(shape) > MAX_DIMENSIONS or any(x > MAX_SIDE for x in shape):
        raise CheckpointError(f"the impossible shape {str(shape)[:80]}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"the unknown dtype {str(entry['dtype'])[:40]}")
    if entry["codec"] not in CODECS:
        raise CheckpointError(f"the unknown codec {str(entry['codec'])[:40]}")
    spec = PartSpec(DTYPES[entry["dtype"]], tuple(shape))
    if stored.dtype != torch.uint8 or len(stored.shape) != 1:
        raise CheckpointError("an archived tensor is stored as a row of bytes")
    if entry["codec"] in WIDENED and spec.dtype != torch.uint8:
        raise CheckpointError(f"{entry['codec']} is for bytes, not for {dtype_name(spec.dtype)}")
    if spec.nbytes <= SMALLEST_BYTES:
        raise CheckpointError(f"tensors of {SMALLEST_BYTES} bytes or less are not archived")
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * stored.nbytes):
        raise CheckpointError(
            f"{stored.nbytes} bytes are said to hold {spec.nbytes}, more than "
            f"{MOST_EXPANSION} times as many"
        )
    return Archived(spec, entry["codec"])


def encode(tensor: Tensor, width: int = 8) -> tuple[Tensor, Archived]:
    """A tensor as a row of bytes, and its description for decoding.

    Args:
        tensor: of any dtype and shape.
        width: the bits of its numbers, if it is uint8 and its rows are bit streams.
    """
    spec = PartSpec(tensor.dtype, tuple(tensor.shape))
    planes = tensor.contiguous().view(-1).view(torch.uint8)
    planes = planes.reshape(-1, spec.dtype.itemsize).t().contiguous()
    codec = f"zstd-{width}"
    if codec in WIDENED:
        numbers = unpack_numbers(tensor, width, _widened_count(spec, width))
        level, content = LEVEL_OF_NUMBERS, pack_numbers(numbers, _widened_bits(width))
    else:
        level, content, codec = LEVEL, planes, "zstd"
    frame = zstandard.ZstdCompressor(level=level).compress(as_bytes(content))
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * len(frame)):
        return planes.view(-1), Archived(spec, "none")
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8), Archived(spec, codec)


def decode(stored: Tensor, archived: Archived) -> Tensor:
    """The tensor that was encoded.

    Never allocates more than the described size: a frame states its content size, and a frame that
    contradicts its metadata is refused before it is opened.

    Raises:
        CheckpointError: this is no frame, it has another size, or numbers need more bits.
    """
    spec = archived.spec
    if archived.codec in WIDENED:
        return _narrowed(stored, spec, WIDENED[archived.codec])
    planes = stored if archived.codec == "none" else _opened(stored, spec.nbytes)
    if planes.numel() != spec.nbytes:
        raise CheckpointError(f"{planes.numel()} bytes where {spec.nbytes} are needed")
    elements = planes.reshape(spec.dtype.itemsize, -1).t().contiguous()
    return elements.view(-1).view(spec.dtype).reshape(spec.shape)


def _opened(stored: Tensor, size: int) -> Tensor:
    """The content of a frame, which has this size."""
    frame = as_bytes(stored)
    try:
        holds = zstandard.frame_content_size(frame)
        if holds != size:
            raise CheckpointError(f"a frame of {holds} bytes where {size} are needed")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"the frame cannot be read: {error}") from None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _narrowed(stored: Tensor, spec: PartSpec, width: int) -> Tensor:
    """The bit streams whose widened numbers are in a frame."""
    *rows, length = spec.shape
    count, wide = _widened_count(spec, width), _widened_bits(width)
    row = row_bytes(count * wide)
    content = _opened(stored, prod(rows) * row).reshape(*rows, row)
    numbers = unpack_numbers(content, wide, count)
    packed = pack_numbers(numbers, width)
    beyond = int((numbers >= 2**width).sum()) + int(packed[..., length:].count_nonzero())
    beyond += padding_bits(content.view(-1, row), count * wide)
    if beyond:
        raise CheckpointError(f"{beyond} widened numbers do not fit the bytes of their stream")
    return packed[..., :length].contiguous()


def _widened_bits(width: int) -> int:
    """The bits of a widened number: 4 or 8, so that bytes hold whole numbers."""
    return 4 if width < 4 else 8


def _widened_count(spec: PartSpec, width: int) -> int:
    """The numbers that the bytes of a row hold, the last one perhaps in part."""
    return -(-8 * spec.shape[-1] // width)
