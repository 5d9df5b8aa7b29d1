"""Where a rough product will do: matmuls in bfloat16, on processors that are faster at them.

A gradient only needs to point the right way, and candidates only need to be ranked. The forwards
of calibration may be rough too, where a recipe says so: then a float32 model sees the rounding
that a bfloat16 model always has. Statistics and solvers are in float32 whatever happens: not in
TF32 either, which has 10 bits of 23 and which a program may have allowed for its own products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """A context in which float32 matmuls have all bits of float32, whatever torch is set to.

    `torch.set_float32_matmul_precision` and the flags it stands for are "highest" inside, and
    afterwards what they were, also after an exception. They hold for the whole process.
    """
    # flags of their own, and those of the CPU, came with torch 2.9
    products: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", 0)]
    before = [getattr(x, "fp32_precision", None) for x in products]
    try:
        together = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer flags were set, and there is no one word for them
        together = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if together is not None:
            torch.set_float32_matmul_precision(together)
        for backend, precision in zip(products, before, strict=True):
            if precision is not None and backend.fp32_precision != precision:
                backend.fp32_precision = precision


@contextmanager
def exact_matmuls(device: torch.device) -> Iterator[None]:
    """A context in which matmuls run in the dtype of what is multiplied, with all its bits."""
    with full_float32(), torch.autocast(device.type, enabled=False):
        yield


def fast_matmuls(device: torch.device) -> torch.autocast:
    """A context in which matmuls run in bfloat16 if that is faster here: two to five times.

    Everything else, the sums of the residual stream among it, stays in the dtype it has.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_fast_bfloat16(device))


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where matmuls are faster in it; None elsewhere."""
    return torch.bfloat16 if _fast_bfloat16(device) else None


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether the processor itself multiplies bfloat16; where it is emulated it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch tells this of a CPU only through private functions; without them float32 is right
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)
