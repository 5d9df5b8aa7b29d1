"""Bits in bytes, lowest first, each row padded to whole bytes with zeros."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["count_bits", "pack_bits", "padding_bits", "row_bytes", "unpack_bits"]

BITS_OF_A_BYTE = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def row_bytes(bits: int) -> int:
    """The bytes of a row of so many bits."""
    return -(-bits // 8)


def pack_bits(bits: Tensor) -> Tensor:
    """Bits, bool [rows, bits], in bytes, uint8 [rows, ceil(bits / 8)]."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`: bool [rows, bits]."""
    found = np.unpackbits(packed.numpy(), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(found.view(np.bool_))


def count_bits(packed: Tensor) -> int:
    """The number of bits that are 1."""
    return int(BITS_OF_A_BYTE[packed.numpy()].sum(dtype=np.int64))


def padding_bits(packed: Tensor, bits: int) -> int:
    """The number of bits that are 1 beyond the end of a row of so many bits."""
    if bits % 8 == 0:
        return 0
    return count_bits(packed[:, -1] >> (bits % 8))
