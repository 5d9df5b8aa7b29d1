"""How the process computes on this machine: the precision of matmuls, and its memory pages.

**Matmuls in bfloat16, on processors that are faster at them, where a rough product will do.** A
gradient only needs to point the right way, and candidates only need to be ranked. The forwards of
calibration may be rough too, where a recipe says so: then a float32 model sees the rounding that a
bfloat16 model always has. Statistics and solvers are in float32 whatever happens: not in TF32
either, which has 10 bits of 23 and which a program may have allowed for its own products.

**Freed memory is used again instead of given back after every operation.** The forwards of one
micro-batch after another allocate and free the same few sizes. glibc returns blocks to the kernel
at once, which has to find and clear new pages for the next one. Measured on ten layers of
SmolLM2-135M: with blocks up to 4 MiB kept, 22.5 s; up to 1 MiB, 31.2 s; up to 32 MiB, 22.8 s, but
then the gaps between blocks of different sizes cost a third more memory than is in use. So the
threshold is fixed at 4 MiB. A step of training is the same larger blocks again and again: there,
blocks up to 32 MiB stay, all of them. A step of 512 tokens took 3.4 s with 4 MiB, 2.6 s with 16,
2.4 s with 64, 2.5 s with blocks of every size, whose gaps are large where the process did other
work before; 32 MiB is the most that older releases of glibc take. Where glibc is not the allocator
nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from secateur.errors import NumericalError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MADV_HUGEPAGE = 14
LARGE_PAGE = 2 * 2**20
"""Bytes of a large page of Linux on x86, and on ARM with pages of 4 KiB."""
KEPT_BLOCK_BYTES, KEPT_BYTES = 4 * 2**20, 64 * 2**20
TRAINING_BLOCK_BYTES, TRAINING_BYTES = 32 * 2**20, 2**31 - 1
"""The largest block that a step of training uses again, and how much of them may lie free."""
LOGITS_BYTES = 64 * 2**20
"""The logits of one model that a training computes at a time. The vocabulary may be large."""
LOGITS_OF_GPU = 64
"""On a GPU these logits take one part of so many of its memory: each block costs some launches."""
DEFAULT_BYTES = 128 * 2**10
NOT_GLIBC = (OSError, AttributeError, TypeError)
"""The errors of looking for its functions; Windows has no library without a name."""


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


def check_finite(square_sums: Tensor) -> None:
    """Refuse inputs that overflowed, seen in their sums of squares [..., in].

    Raises:
        NumericalError: a sum is infinite or NaN.
    """
    bad = (~torch.isfinite(square_sums)).nonzero()[:, -1]
    if len(bad):
        raise NumericalError(
            f"{len(bad)} of {square_sums.numel()} calibration inputs are infinite or not a number; "
            f"the first is feature {int(bad[0])}",
            remedy="load the model in bfloat16 or float32, which do not overflow as float16 does",
        )


@contextmanager
def exact_in_tf32(*factors: Tensor) -> Iterator[None]:
    """A context in which a GPU multiplies these numbers in TF32 where that loses nothing.

    TF32 has the 10 bits of a float16 and the exponents of a float32, so every bfloat16 and float16
    is exact in it. The sums of their products are float32 as ever, eight times as fast.
    """
    short = all(x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) for x in factors)
    if not short:
        yield
        return
    products: Any = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(products, "fp32_precision") else "allow_tf32"  # torch < 2.9
    before = getattr(products, name)
    setattr(products, name, "tf32" if name == "fp32_precision" else True)
    try:
        yield
    finally:
        setattr(products, name, before)


def fast_matmuls(device: torch.device) -> torch.autocast:
    """A context in which matmuls run in bfloat16 if that is faster here: two to five times.

    Everything else, the sums of the residual stream among it, stays in the dtype it has.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_fast_bfloat16(device))


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where matmuls are faster in it; None elsewhere."""
    return torch.bfloat16 if _fast_bfloat16(device) else None


def logits_block(device: torch.device) -> int:
    """The bytes of the logits that a training computes at a time."""
    if device.type != "cuda":
        return LOGITS_BYTES
    # of all memory, not of the free part: a resumed training has the same blocks
    return max(LOGITS_BYTES, torch.cuda.mem_get_info(device)[1] // LOGITS_OF_GPU)


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether the processor itself multiplies bfloat16; where it is emulated it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch tells this of a CPU only through private functions; without them float32 is right
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """Add `alpha` · left @ right to a matrix in place, or to each matrix of a batch. Return it."""
    add = total.addmm_ if total.dim() == 2 else total.baddbmm_
    return add(left, right, alpha=alpha)


def add_rows(total: Tensor, shares: Tensor, rows: Tensor, alpha: float = 1) -> None:
    """Add `alpha` · Σ_k share_k row_k to a row [n] in place, or to a row of each matrix of a batch.

    Args:
        total: [..., n].
        shares: [..., k].
        rows: [..., k, n].
        alpha: multiplies the sum.
    """
    if total.dim() == 1:
        total.addmv_(rows.t(), shares, alpha=alpha)
    elif total.is_cpu:  # rounds as it does for one, and is as fast
        for each in zip(total, shares, rows, strict=True):
            add_rows(*each, alpha)
    else:
        total[:, None].baddbmm_(shares[:, None], rows, alpha=alpha)


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
    """Ask for large pages in memory that nothing has touched; on Linux only."""
    if sys.platform == "linux":
        with suppress(*NOT_GLIBC):
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_HUGEPAGE)
