"""The tensors of an archive: byte planes, compressed with zstandard.

A plane has the first bytes of all elements, the next the second bytes, and so on. Exponents of
weights are much alike and mantissas are not, so they compress better apart. Numbers of 3, 5, 6 or 7
bits are first widened, because zstandard counts bytes: in a bit stream most bytes hold pieces of
several numbers. Archives are lossless, and meant for storage and transfer; loading unpacks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import torch
import zstandard
from pydantic import ConfigDict, Field, StrictInt
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.checkpoint import DTYPES, MAX_DIMENSIONS, MAX_SIDE, as_bytes, dtype_name
from secateur.runtime.formats import PartSpec, bits

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
"""A tensor up to this size is read whatever its frame claims: it cannot use up memory."""

WIDENED = {"zstd-3": 3, "zstd-5": 5, "zstd-6": 6, "zstd-7": 7}
"""The codecs for bit streams whose numbers straddle bytes, and the bits of these numbers."""


@dataclass(frozen=True)
class Archived:
    """The tensor that stored bytes decode to, as the description of a file has it.

    Attributes:
        dtype: its name in safetensors.
        shape: of the tensor.
        codec: `zstd`: a frame of the byte planes; `none`: the byte planes uncompressed;
            `zstd-3` and the others of `WIDENED`: a frame of numbers of so many bits, widened.
    """

    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]
    shape: Annotated[
        tuple[Annotated[StrictInt, Field(ge=0, le=MAX_SIDE)], ...], Field(max_length=MAX_DIMENSIONS)
    ]
    codec: Literal["zstd", "none", "zstd-3", "zstd-5", "zstd-6", "zstd-7"]

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, spec: PartSpec, codec: str) -> Archived:
        """A tensor of this dtype and shape."""
        return cls(dtype_name(spec.dtype), spec.shape, codec)  # type: ignore[arg-type]

    @property
    def spec(self) -> PartSpec:
        """Dtype and shape of the tensor."""
        return PartSpec(DTYPES[self.dtype], self.shape)

    def to_json(self) -> dict[str, Any]:
        """For the metadata of a file."""
        return {"dtype": self.dtype, "shape": list(self.shape), "codec": self.codec}

    def check(self, stored: PartSpec) -> None:
        """Refuse bytes that cannot decode to this tensor.

        Raises:
            CheckpointError: the decoded size is larger than `MOST_EXPANSION` allows, or the codec
                is for other tensors.
        """
        size = self.spec.nbytes
        if stored.dtype != torch.uint8 or len(stored.shape) != 1:
            raise CheckpointError("an archived tensor is stored as a row of bytes")
        if self.codec in WIDENED and self.spec.dtype != torch.uint8:
            raise CheckpointError(f"{self.codec} is for bytes, not for {self.dtype}")
        most = max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * stored.nbytes)
        if not SMALLEST_BYTES < size <= most:
            raise CheckpointError(f"{stored.nbytes} bytes are said to hold {size}")


def to_archive(tensor: Tensor, width: int = 8) -> tuple[Tensor, Archived]:
    """A tensor as a row of bytes, and its description for decoding.

    Args:
        tensor: of any dtype and shape.
        width: the bits of its numbers, if it is uint8 and its rows are bit streams.
    """
    spec = PartSpec(tensor.dtype, tuple(tensor.shape))
    # [elements, bytes of one] → [bytes of one, elements]: plane b has byte b of every element
    planes = tensor.contiguous().view(-1).view(torch.uint8)
    planes = planes.reshape(-1, spec.dtype.itemsize).t().contiguous()
    codec = f"zstd-{width}"
    if codec in WIDENED:
        numbers = bits.unpack_numbers(tensor, width, _widened_count(spec, width))
        level, content = LEVEL_OF_NUMBERS, bits.pack_numbers(numbers, _widened_bits(width))
    else:
        level, content, codec = LEVEL, planes, "zstd"
    frame = zstandard.ZstdCompressor(level=level).compress(as_bytes(content))
    # a reader would take so small a frame for an attack, so the planes are stored as they are
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * len(frame)):
        return planes.view(-1), Archived.of(spec, "none")
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8), Archived.of(spec, codec)


def from_archive(stored: Tensor, archived: Archived) -> Tensor:
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
        # from the header of the frame: nothing is allocated before the size is known to be right
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
    row = bits.row_bytes(count * wide)
    content = _opened(stored, prod(rows) * row).reshape(*rows, row)
    numbers = bits.unpack_numbers(content, wide, count)
    packed = bits.pack_numbers(numbers, width)
    # What a writer leaves 0 must be 0: the upper bits of numbers, the last row's bytes, its bits.
    beyond = int((numbers >= 2**width).sum()) + int(packed[..., length:].count_nonzero())
    beyond += bits.padding_bits(content.view(-1, row), count * wide)
    if beyond:
        raise CheckpointError(f"{beyond} widened numbers do not fit the bytes of their stream")
    return packed[..., :length].contiguous()


def _widened_bits(width: int) -> int:
    """The bits of a widened number: 4 or 8, so that bytes hold whole numbers."""
    return 4 if width < 4 else 8


def _widened_count(spec: PartSpec, width: int) -> int:
    """The numbers that the bytes of a row hold, the last one perhaps in part."""
    return -(-8 * spec.shape[-1] // width)
