"""Memory pages: used again instead of given back after every operation, and large ones.

The forwards of one micro-batch after another allocate and free the same few sizes. glibc returns
blocks to the kernel at once, which has to find and clear new pages for the next one. Measured on
ten layers of SmolLM2-135M: with blocks up to 4 MiB kept, 22.5 s; up to 1 MiB, 31.2 s; up to 32 MiB,
22.8 s, but then the gaps between blocks of different sizes cost a third more memory than is in
use. So the threshold is fixed at 4 MiB. A step of training is the same larger blocks again and
again: there, blocks up to 32 MiB stay, all of them. A step of 512 tokens took 3.4 s with 4 MiB,
2.6 s with 16, 2.4 s with 64, 2.5 s with blocks of every size, whose gaps are large where the
process did other work before; 32 MiB is the most that older releases of glibc take. Where glibc is
not the allocator nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MADV_HUGEPAGE = 14
LARGE_PAGE = 2 * 2**20
"""Bytes of a large page of Linux on x86, and on ARM with pages of 4 KiB."""
KEPT_BLOCK_BYTES, KEPT_BYTES = 4 * 2**20, 64 * 2**20
TRAINING_BLOCK_BYTES, TRAINING_BYTES = 32 * 2**20, 2**31 - 1
"""The largest block that a step of training uses again, and how much of them may lie free."""
LOGITS_BYTES = 64 * 2**20
"""The logits of one model that a training computes at a time. The vocabulary may be large."""
DEFAULT_BYTES = 128 * 2**10
NOT_GLIBC = (OSError, AttributeError, TypeError)
"""The errors of looking for its functions; Windows has no library without a name."""


def give_back() -> None:
    """Return freed memory to the system, so that the process holds only what it uses."""
    gc.collect()
    trim()


def trim() -> None:
    """Return memory to the system that is free already."""
    with suppress(*NOT_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def reused_pages(largest: int = KEPT_BLOCK_BYTES, kept: int = KEPT_BYTES) -> Iterator[None]:
    """Let freed memory stay with the process; it is given back at the end.

    Args:
        largest: bytes of the largest block that stays.
        kept: bytes that may lie free at the end of the heap.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except NOT_GLIBC:
        yield
        return
    # setting either also stops glibc from moving the thresholds by itself
    mallopt(M_MMAP_THRESHOLD, largest)
    mallopt(M_TRIM_THRESHOLD, kept)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, DEFAULT_BYTES)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_BYTES)
        trim(0)


def reused_training_pages() -> AbstractContextManager[None]:
    """`reused_pages` for the steps of a training."""
    return reused_pages(TRAINING_BLOCK_BYTES, TRAINING_BYTES)


def ask_for_large_pages(address: int, nbytes: int) -> None:
    """Ask for large pages in memory that was not touched yet; only Linux is asked."""
    if sys.platform == "linux":
        with suppress(*NOT_GLIBC):
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_HUGEPAGE)
