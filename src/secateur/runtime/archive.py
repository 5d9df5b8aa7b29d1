"""The archive: every larger tensor as byte planes, compressed with zstandard.

The first bytes of all elements, then the second bytes, and so on: the exponents of weights are
much alike and their mantissas are not, so apart from each other they compress further. Lossless.
For keeping and sending; a runtime unpacks it when it loads.
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
"""Tensors up to this size are stored as they are."""

LEVEL = 9
"""Of zstandard: 1 to 2 % smaller than level 3 on packed weights; reading costs the same."""

MOST_EXPANSION = 1024
"""A frame that grows by more is not believed: so a small file cannot ask for all memory."""

ALWAYS_BELIEVED_BYTES = 16 * 2**20

CODECS = ("zstd", "none")


@dataclass(frozen=True)
class Archived:
    """What a stored run of bytes decodes to.

    Attributes:
        spec: dtype and shape of the tensor.
        codec: `zstd`: a frame of the byte planes; `none`: the byte planes as they are.
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


def archived_spec(told: Any, stored: PartSpec) -> Archived:
    """Read what `to_json` told, held against the bytes that are stored.

    Raises:
        CheckpointError: a key is missing or of the wrong kind, or more bytes are promised than
            the stored ones can be believed to hold.
    """
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "codec"}:
        raise CheckpointError("an archived tensor has the keys dtype, shape and codec")
    shape = told["shape"]
    if not is_counts(shape) or len(shape) > MAX_DIMENSIONS or any(x > MAX_SIDE for x in shape):
        raise CheckpointError(f"the impossible shape {str(shape)[:80]}")
    if not isinstance(told["dtype"], str) or told["dtype"] not in DTYPES:
        raise CheckpointError(f"the unknown dtype {str(told['dtype'])[:40]}")
    if told["codec"] not in CODECS:
        raise CheckpointError(f"the unknown codec {str(told['codec'])[:40]}")
    spec = PartSpec(DTYPES[told["dtype"]], tuple(shape))
    if stored.dtype != torch.uint8 or len(stored.shape) != 1:
        raise CheckpointError("an archived tensor is stored as a row of bytes")
    if spec.nbytes <= SMALLEST_BYTES:
        raise CheckpointError(f"tensors of {SMALLEST_BYTES} bytes or less are not archived")
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * stored.nbytes):
        raise CheckpointError(
            f"{stored.nbytes} bytes are said to hold {spec.nbytes}, more than "
            f"{MOST_EXPANSION} times as many"
        )
    return Archived(spec, told["codec"])


def encode(tensor: Tensor) -> tuple[Tensor, Archived]:
    """A tensor as a row of bytes, and what is needed to decode it."""
    spec = PartSpec(tensor.dtype, tuple(tensor.shape))
    planes = tensor.contiguous().view(-1).view(torch.uint8)
    planes = planes.reshape(-1, spec.dtype.itemsize).t().contiguous()
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(as_bytes(planes))
    if spec.nbytes > max(ALWAYS_BELIEVED_BYTES, MOST_EXPANSION * len(frame)):
        return planes.view(-1), Archived(spec, "none")
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8), Archived(spec, "zstd")


def decode(stored: Tensor, archived: Archived) -> Tensor:
    """The tensor that was encoded.

    Nothing larger than the promised size is ever allocated: a frame says how much it holds, and
    one that says otherwise than its metadata is refused before it is opened.

    Raises:
        CheckpointError: not a frame, or of another size.
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
