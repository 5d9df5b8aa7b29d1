"""The archive stores every larger tensor as byte planes, compressed with zstandard.

A plane has the first bytes of all elements, the next the second bytes, and so on. Exponents of
weights are much alike and mantissas are not, so they compress better apart. Archives are lossless,
and meant for storage and transfer; a runtime unpacks them when it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import zstandard
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.checkpoint import as_bytes
from secateur.models.header import DTYPES, MAX_DIMENSIONS, MAX_SIDE, is_counts
from secateur.models.shard_writer import dtype_name
from secateur.runtime.formats import PartSpec

__all__ = ["Archived", "archived_spec", "decode", "encode"]

SMALLEST_BYTES = 1024
"""Tensors up to this size are not compressed."""

LEVEL = 9
"""The level of zstandard: 1 to 2 % smaller than level 3 on packed weights, equally fast to read."""

MOST_EXPANSION = 1024
"""A frame that grows by more is refused, so a small file cannot use up all memory."""

ALWAYS_BELIEVED_BYTES = 16 * 2**20

CODECS = ("zstd", "none")


@dataclass(frozen=True)
class Archived:
    """The tensor that stored bytes decode to.

    Attributes:
        spec: dtype and shape of the tensor.
        codec: `zstd`: a frame of the byte planes; `none`: the byte planes uncompressed.
    """

    spec: PartSpec
    codec: str

    def to_json(self) -> dict[str, Any]:
        """For the metadata of a file."""
        return {
            "dtype": dtype_name(self.spec.dtype),
            "shape": list(self.spec.shape),
            "codec": self.codec,
        }


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
    if spec.nbytes <= SMALLEST_BYTES:
        raise CheckpointError(f"tensors of {SMALLEST_BYTES} bytes or less are not archived")
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * stored.nbytes):
        raise CheckpointError(
            f"{stored.nbytes} bytes are said to hold {spec.nbytes}, more than "
            f"{MOST_EXPANSION} times as many"
        )
    return Archived(spec, entry["codec"])


def encode(tensor: Tensor) -> tuple[Tensor, Archived]:
    """A tensor as a row of bytes, and its description for decoding."""
    spec = PartSpec(tensor.dtype, tuple(tensor.shape))
    planes = tensor.contiguous().view(-1).view(torch.uint8)
    planes = planes.reshape(-1, spec.dtype.itemsize).t().contiguous()
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(as_bytes(planes))
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * len(frame)):
        return planes.view(-1), Archived(spec, "none")
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8), Archived(spec, "zstd")


def decode(stored: Tensor, archived: Archived) -> Tensor:
    """The tensor that was encoded.

    Never allocates more than the described size: a frame states its content size, and a frame that
    contradicts its metadata is refused before it is opened.

    Raises:
        CheckpointError: this is no frame, or it has another size.
    """
    spec = archived.spec
    if archived.codec == "none":
        planes = stored
    else:
        frame = as_bytes(stored)
        try:
            holds = zstandard.frame_content_size(frame)
            if holds != spec.nbytes:
                raise CheckpointError(f"a frame of {holds} bytes where {spec.nbytes} are needed")
            opened = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CheckpointError(f"the frame cannot be read: {error}") from None
        planes = torch.frombuffer(bytearray(opened), dtype=torch.uint8)
    if planes.numel() != spec.nbytes:
        raise CheckpointError(f"{planes.numel()} bytes where {spec.nbytes} are needed")
    elements = planes.reshape(spec.dtype.itemsize, -1).t().contiguous()
    return elements.view(-1).view(spec.dtype).reshape(spec.shape)
