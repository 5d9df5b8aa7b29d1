"""Tests of the kernels are skipped where there are none, with the reason."""

from __future__ import annotations

import pytest

from secateur.runtime.kernels.library import kernel_info

needs_kernels = pytest.mark.skipif(
    kernel_info().tier == "none", reason=f"no kernels here: {kernel_info().reason}"
)
