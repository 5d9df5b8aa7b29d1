"""Run tests on the pretended device, in a process of its own: `rehearse.py LIBRARY ARGUMENTS…`.

The library must be there before torch, and changes what torch believes of the machine for good, so
no other test may run in the same process.
"""

from __future__ import annotations

import ctypes
import os
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    os.environ["PRETENDED_CUDA"] = sys.argv[1]
    import pytest

    sys.exit(pytest.main(sys.argv[2:]))
