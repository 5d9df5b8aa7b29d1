"""Memory pages that are used again instead of given back to the system after every operation.

The forwards of one micro-batch after another allocate and free the same few sizes. glibc returns
large blocks to the kernel at once, which then has to find and clear new pages for the next: on
SmolLM2-135M that was a fifth of the time of a forward. Where glibc is not the allocator nothing is
done.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["reused_pages"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no more
KEPT_BYTES = 512 * 2**20
DEFAULT_BYTES = 128 * 2**10


@contextmanager
def reused_pages() -> Iterator[None]:
    """Let freed memory stay with the process; it is given back at the end."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, DEFAULT_BYTES)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_BYTES)
        trim(0)
