"""Refuses weights that are NaN or infinite, in files, before a verb works with them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import NumericalError
from secateur.models.checkpoint import read_all
from secateur.models.header import read_header

BLOCK_VALUES = 2**21
"""So many values are in memory while a file is checked for NaN."""
NOT_FINITE = {
    torch.float8_e4m3fn: (0x7F, 0x7F),
    torch.float8_e5m2: (0x7F, 0x7C),
    torch.float8_e8m0fnu: (0xFF, 0xFF),
}
"""For floats of one byte, which torch cannot add up: the bits besides the sign, and the lowest
pattern of these bits that is no finite number."""


def refuse_not_finite(files: Iterable[Path]) -> None:
    """Refuse weights that are NaN or infinite. Each file is read once, in small blocks.

    A process checks a file once, as long as nobody changes it.

    Args:
        files: safetensors files, of plain weights or of the parts of packed ones.

    Raises:
        NumericalError: there are such values; the message names the tensors and their number.
    """
    for file in files:
        found = file.stat()
        check_values(file.absolute(), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def check_values(file: Path, inode: int, size: int, changed: int) -> None:
    """Refuse a file with NaN or infinite values; the other arguments say which file it is."""
    bad: dict[str, tuple[int, int]] = {}
    with file.open("rb", buffering=0) as stream:
        for name, entry in read_header(file).entries.items():
            if not entry.dtype.is_floating_point:
                continue
            count, odd = prod(entry.shape), 0
            block = torch.empty(min(count, BLOCK_VALUES), dtype=entry.dtype)
            stream.seek(entry.offset)
            for start in range(0, count, BLOCK_VALUES):
                block = block[: count - start]
                read_all(stream, block)
                odd += not_finite(block)
            if odd:
                bad[name] = odd, count
    if bad:
        name, (odd, count) = next(iter(bad.items()))
        more = f"; so are values of {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise NumericalError(
            f"{odd} of {count} weights are NaN or infinite{more}",
            where=f"{name} in {file}",
            remedy="the checkpoint is damaged: download or make it again; "
            "`secateur diagnose` lists all such tensors",
        )


def not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    if tensor.dtype in NOT_FINITE:
        bits, lowest = NOT_FINITE[tensor.dtype]
        return int((tensor.view(torch.uint8).bitwise_and(bits) >= lowest).sum())
    # One sum is enough for good values; only a bad one is examined in detail.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return 0
    return int((~torch.isfinite(tensor)).sum())
