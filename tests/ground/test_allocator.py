"""When freed memory stays with the process, and when it is given back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

MEASURED = """
import os
import torch
from secateur.machine import TRAINING_BLOCK_BYTES, TRAINING_BYTES, reused_pages

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

def use(count):
    blocks = [torch.ones(2**20, dtype=torch.uint8) for _ in range(count)]
    return resident() - before

torch.set_num_threads(1)
for count, sizes in (50, ()), (300, (TRAINING_BLOCK_BYTES, TRAINING_BYTES)):
    before = resident()
    with reused_pages(*sizes):
        used = use(count)
        freed = resident() - before
        large = torch.ones(2**28, dtype=torch.uint8)
        del large
        largest = resident() - before
    print(count, used, freed, largest, resident() - before)
"""


HELD = """
import os
from secateur.machine import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

blocks = [bytearray(100_000) for _ in range(800)]
last = blocks[-1]
del blocks
before = resident()
give_back()
print(before - resident())
"""

GLIBC = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator is not glibc's"
)


@GLIBC
def test_freed_memory_below_a_held_block_is_given_back() -> None:
    output = subprocess.run(
        [sys.executable, "-c", HELD], check=True, capture_output=True, text=True
    ).stdout
    assert int(output) > 50


@GLIBC
def test_freed_blocks_stay_until_the_end() -> None:
    """By default 64 MiB may lie free at the end of the heap; in a training everything."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True
    )
    measured = [[*map(int, line.split())] for line in done.stdout.splitlines()]
    assert [count for count, *_ in measured] == [50, 300]
    for count, used, freed, largest, after in measured:
        assert count - 10 <= used <= count + 30
        assert count - 10 <= freed <= used
        assert largest <= freed + 8, "a block that is larger than all others stayed"
        assert after < 30
