"""Where a rough product will do: matmuls in bfloat16, on processors that are faster at them.

A gradient only needs to point the right way, and candidates only need to be ranked. The forwards
of calibration may be rough too, where a recipe says so: then a float32 model sees the rounding
that a bfloat16 model always has. Statistics and solvers are in float32 whatever happens.
"""

from __future__ import annotations

import torch

__all__ = ["exact_matmuls", "fast_dtype", "fast_matmuls"]


def exact_matmuls(device: torch.device) -> torch.autocast:
    """A context in which matmuls run in the dtype of what is multiplied."""
    return torch.autocast(device.type, enabled=False)


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
