"""Matrices without their zeros: the formats sparse-bitmask and sparse-24-bitmask.

compressed   the values that are kept, row after row
bitmask      uint8 [rows, ⌈columns / 8⌉]; bit i of byte j is column 8 j + i
shape        of the dense tensor
row_offsets  sparse-bitmask only: the index of the first value of each row
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from secateur.models.at_rest import Assembly, Parts, damaged
from secateur.models.checkpoint import CheckpointReader

PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def sparse_assembly(reader: CheckpointReader, parts: Mapping[str, str]) -> Assembly:
    """The tensor that these parts make.

    Args:
        reader: the stored tensors; only the shape is read now.
        parts: the names of `PARTS`.

    Raises:
        CheckpointError: a part is missing, or has an impossible shape.
    """
    missing = {"compressed", "bitmask", "shape"} - parts.keys()
    if missing:
        raise damaged(f"there is no {min(missing)} beside them", next(iter(parts.values())))
    place, entries = parts["bitmask"], {role: reader.entries[name] for role, name in parts.items()}
    if entries["shape"].dtype.is_floating_point or prod(entries["shape"].shape) not in (1, 2):
        raise damaged("the shape of the tensor is not one or two whole numbers", parts["shape"])
    shape = tuple(int(x) for x in reader.read(parts["shape"]).flatten())
    if min(shape) < 1 or entries["bitmask"].dtype != torch.uint8:
        raise damaged(f"a bitmask of {entries['bitmask'].dtype} for the shape {list(shape)}", place)
    packed = (*shape[:-1], -(-shape[-1] // 8))
    if entries["bitmask"].shape != packed:
        raise damaged(
            f"the bitmask is {list(entries['bitmask'].shape)}, the shape {list(shape)} needs "
            f"{list(packed)}",
            place,
        )
    stored_as = "sparse-bitmask" if "row_offsets" in parts else "sparse-24-bitmask"
    return Assembly(
        parts, shape, entries["compressed"].dtype, stored_as, lambda p: _opened(p, shape)
    )


def _opened(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor."""
    bits = _bits_of(parts["bitmask"])
    kept = bits[..., : shape[-1]]
    values = parts["compressed"].flatten()
    if bits[..., shape[-1] :].any():
        raise damaged("the bitmask keeps weights beyond the last column", "bitmask")
    counts = kept.sum(-1, dtype=torch.int64).flatten()
    if int(counts.sum()) != values.numel():
        raise damaged(
            f"the bitmask keeps {int(counts.sum())} weights, {values.numel()} are stored", "bitmask"
        )
    if "row_offsets" in parts:
        starts = counts.cumsum(0) - counts
        if not torch.equal(parts["row_offsets"].flatten().to(torch.int64), starts):
            raise damaged("the offsets of the rows are not those of the bitmask", "row_offsets")
    raw = torch.uint8 if values.itemsize == 1 else values.dtype  # float8 has no scatter
    dense = torch.zeros(shape, dtype=raw)
    dense[kept] = values.view(raw)
    return dense.view(values.dtype)


def _bits_of(packed: Tensor) -> Tensor:
    """Bools of the bits of bytes [..., n] → [..., 8 n], the lowest bit first.

    Example:
        >>> import torch
        >>> from secateur.models.at_rest.compressed_tensors.bitmask import _bits_of
        >>> _bits_of(torch.tensor([5], dtype=torch.uint8)).int().tolist()
        [1, 0, 1, 0, 0, 0, 0, 0]
    """
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)
