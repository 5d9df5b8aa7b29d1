"""Bits and small numbers in bytes, lowest first, each row padded to whole bytes with zeros."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Numbers of `width` bits without gaps: bit k of number n is bit n · width + k of its row.

    Args:
        numbers: whole numbers [..., n]. Their lowest `width` bits are stored, so negative ones
            are in two's complement.
        width: 1 to 8 for numbers of 8 bits, up to 31 for wider ones.

    Returns:
        uint8 [..., ceil(n · width / 8)].

    Example:
        >>> import torch
        >>> from secateur.runtime.formats.bits import pack_numbers
        >>> pack_numbers(torch.tensor([7, -2, 1], dtype=torch.int8), 4)  # 0xe7 0x01
        tensor([231,   1], dtype=torch.uint8)
    """
    # 8 numbers of any width fill `width` whole bytes, so blocks of 8 are packed all at once
    *rows, count = numbers.shape
    blocks = row_bytes(count)
    found = numbers.numpy()
    wide = np.zeros((*rows, blocks * 8), found.dtype)
    wide[..., :count] = found
    if wide.dtype.itemsize == 1:
        # unsigned, or a shift to the right would copy the sign into the bits
        wide = wide.view(np.uint8)
    wide = wide.reshape(*rows, blocks, 8) & (2**width - 1)
    packed = np.zeros((*rows, blocks, width), np.uint8)
    for place in range(8):
        for byte, shift in _bytes_of(place, width):
            moved = wide[..., place] >> shift if shift >= 0 else wide[..., place] << -shift
            packed[..., byte] |= moved.astype(np.uint8)  # the lowest 8 bits
    trimmed = packed.reshape(*rows, blocks * width)[..., : row_bytes(count * width)]
    return torch.from_numpy(np.ascontiguousarray(trimmed))


def unpack_numbers(packed: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `pack_numbers`, without signs.

    Args:
        packed: uint8 [..., ceil(count · width / 8)].
        width: the bits of a number.
        count: the numbers of a row.

    Returns:
        [..., count], uint8 for up to 8 bits, otherwise int32.
    """
    *rows, length = packed.shape
    blocks = row_bytes(count)
    stored = np.zeros((*rows, blocks * width), np.uint8)
    stored[..., :length] = packed.numpy()
    stored = stored.reshape(*rows, blocks, width)
    numbers = np.zeros((*rows, blocks, 8), np.uint8 if width <= 8 else np.int32)
    # a number that straddles bytes is put together from two or more of them
    for place in range(8):
        for byte, shift in _bytes_of(place, width):
            part = stored[..., byte].astype(numbers.dtype, copy=False)
            numbers[..., place] |= part << shift if shift >= 0 else part >> -shift
    numbers &= numbers.dtype.type(2**width - 1)
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(*rows, -1)[..., :count]))


def _bytes_of(place: int, width: int) -> list[tuple[int, int]]:
    """The bytes that hold the number at `place` of 8 numbers, and where each begins in it."""
    # a positive shift: the byte begins that many bits into the number
    first, last = place * width, (place + 1) * width - 1
    return [(byte, 8 * byte - first) for byte in range(first // 8, last // 8 + 1)]


def count_bits(packed: Tensor) -> int:
    """The number of bits that are 1."""
    return int(BITS_OF_A_BYTE[packed.numpy()].sum(dtype=np.int64))


def padding_bits(packed: Tensor, bits: int) -> int:
    """The number of bits that are 1 beyond the end of a row of so many bits."""
    if bits % 8 == 0:
        return 0
    return count_bits(packed[:, -1] >> (bits % 8))
