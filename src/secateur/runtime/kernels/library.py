"""Finds and loads the C library, and describes it to ctypes.

`pip install` builds it where there is a compiler. Without it everything still runs: packed matrices
are expanded when loaded, and torch multiplies them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from secateur.errors import KernelError

ABI = 13
MAX_BATCH = 8
"""The most rows of activations for one call of a kernel."""

TYPES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3})
"""The numbers of the types of values, `sct_type` in csrc/secateur.h."""

INT4 = 4
"""The number of the type that torch does not have."""

SUFFIXES = (".so", ".dylib", ".pyd", ".dll")
"""Of the file of the library, on whatever system it was built."""

LIBRARY_VARIABLE = "SECATEUR_KERNELS"
"""Environment variable that names another build of the library, or `none`."""

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double


class CMatrix(ctypes.Structure):
    """`sct_matrix`: a weight [rows, columns]."""

    _fields_ = (
        *((name, _I64) for name in ("rows", "columns", "words", "stride", "type")),
        *((name, _POINTER) for name in ("values", "mask", "offsets", "scale")),
        ("group", _I64),
        *((name, _POINTER) for name in ("scales", "exponents")),
        ("of_four", _I64),
    )


class CNorm(ctypes.Structure):
    """`sct_norm_weights`: a norm over hidden, or none."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class CFeedForward(ctypes.Structure):
    """`sct_ffn`: the matrices of a feed-forward."""

    _fields_ = (
        *((name, CMatrix) for name in ("gate", "up", "down")),
        *((f"{name}_bias", _POINTER) for name in ("gate", "up", "down")),
    )


class CLayer(ctypes.Structure):
    """`sct_layer`: one decoder layer."""

    _fields_ = (
        *((name, CMatrix) for name in ("q", "k", "v", "o")),
        *((name, CNorm) for name in ("attention_in", "attention_out", "ffn_in", "ffn_out")),
        *((f"{name}_bias", _POINTER) for name in ("q", "k", "v", "o")),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "cosine", "sine")),
        ("window", _I64),
        *((name, _POINTER) for name in ("sinks", "keys", "values")),
        ("tiles", _I64),
        ("ffn", CFeedForward),
        ("experts", _I64),
        ("expert", ctypes.POINTER(CFeedForward)),
        ("router", CMatrix),
        *((name, _POINTER) for name in ("router_bias", "correction", "shared_gate")),
    )


class CDecoder(ctypes.Structure):
    """`sct_decoder`: all layers, the head and what layers have in common."""

    _fields_ = (
        *((name, _I64) for name in ("layers", "hidden", "heads", "kv_heads", "head")),
        *((name, _I64) for name in ("vocabulary", "cache_type", "exact")),
        ("epsilon", _FLOAT),
        ("layer", ctypes.POINTER(CLayer)),
        ("final_norm", CNorm),
        ("head_matrix", CMatrix),
        *((name, _I64) for name in ("centered", "parallel")),
        ("residual", _FLOAT),
        ("activation", _I64),
        *((name, _FLOAT) for name in ("alpha", "limit")),
        *((name, _I64) for name in ("chosen", "router_sigmoid", "normalise")),
        ("routed_scale", _FLOAT),
        *((name, _I64) for name in ("rotary", "interleaved", "qk_norm", "norm_rotated")),
        *((name, _FLOAT) for name in ("attention_scale", "softcap", "clip")),
        ("taps", _I64),
        ("tap", _POINTER),
        ("token_norm", CNorm),
    )


class CToken(ctypes.Structure):
    """`sct_token`: the slot and the position of a token."""

    _fields_ = (("slot", _I64), ("position", _I64))


class CChances(ctypes.Structure):
    """`sct_chances`: the probabilities of a token."""

    _fields_ = (
        *(("logits", _POINTER), ("count", _I64), ("ids", _POINTER)),
        *((name, _FLOAT) for name in ("temperature", "top_p", "min_p")),
        *(("top_k", _I64), ("sums", _POINTER), ("kept", _POINTER)),
        *((name, _I64) for name in ("best", "keeps", "last")),
        *((name, _FLOAT) for name in ("most", "factor", "least")),
        ("total", _DOUBLE),
    )


@dataclass(frozen=True)
class KernelInfo:
    """The kernels that multiply packed matrices on this machine.

    Args:
        tier: `amx`, `avx512bf16`, `avx512`, `avx2`, `neon-i8mm`, `neon`, or `none`: matrices are
            expanded when loaded, and there is no gain.
        threads: of the pool of the kernels; 0 without kernels.
        reason: why the tier is `none`, and what to do; empty otherwise.
    """

    tier: str
    threads: int
    reason: str = ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None where it was not built.

    Raises:
        KernelError: the library that the environment names is missing or of another version.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named == "none":
        return None
    # the name has a suffix of Python's version, though the library does not use Python
    found = sorted(Path(__file__).parent.glob("_native*"))
    built = [Path(named)] if named else [file for file in found if file.suffix in SUFFIXES]
    if not built:
        return None
    try:
        loaded = ctypes.CDLL(str(built[0]))
        loaded.sct_abi.restype = ctypes.c_int
        version = loaded.sct_abi()
    except (OSError, AttributeError) as error:
        raise KernelError(
            f"the kernels cannot be loaded: {error}",
            where=str(built[0]),
            remedy=f"install again, or set {LIBRARY_VARIABLE}=none to run without kernels",
        ) from error
    # structs are described twice, here and in secateur.h: one that is older would read beyond them
    if version != ABI:
        raise KernelError(
            f"the kernels have version {version}, but this is version {ABI}",
            where=str(built[0]),
            remedy="install again to rebuild them",
        )
    _declare(loaded)
    return loaded


def _declare(loaded: ctypes.CDLL) -> None:
    """The signatures of csrc/secateur.h."""
    structs = CMatrix, CDecoder, CToken, CChances
    matrix, decoder, tokens, chances = map(ctypes.POINTER, structs)
    product = [matrix, _I64, _POINTER, _I64, _POINTER, _I64, _I64]
    signatures: dict[str, list[Any]] = {
        "sct_tier": [],
        "sct_use_tier": [ctypes.c_char_p],
        "sct_threads": [],
        "sct_set_threads": [ctypes.c_int],
        "sct_linear": product,
        "sct_prompt": product,
        "sct_expand": [matrix, _I64, _I64, _POINTER],
        "sct_gather": [matrix, _POINTER, _I64, _POINTER],
        "sct_embed": [matrix, _POINTER, _I64, _FLOAT, _I64, _POINTER],
        "sct_read": [decoder, _POINTER, _I64, _I64, _I64, _I64, _POINTER, _POINTER],
        "sct_attention_alone": [decoder, tokens, _I64, _I64, _I64, _POINTER],
        "sct_decode": [decoder, _POINTER, tokens, _I64, _I64, _POINTER, _POINTER],
        "sct_advance": [decoder, _POINTER, tokens, _I64, _POINTER, _POINTER],
        "sct_weigh": [chances],
        "sct_chance": [chances, _I64],
        "sct_draw": [chances, chances, _DOUBLE, _DOUBLE],
    }
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_int, arguments
    loaded.sct_tier.restype = ctypes.c_char_p
    loaded.sct_chance.restype, loaded.sct_draw.restype = _DOUBLE, _I64


def kernel_info() -> KernelInfo:
    """The active tier, or the reason why there is none."""
    loaded = library()
    if loaded is None and os.environ.get(LIBRARY_VARIABLE) == "none":
        return KernelInfo("none", 0, f"{LIBRARY_VARIABLE}=none switches the kernels off; unset it")
    if loaded is None:
        return KernelInfo(
            "none",
            0,
            "the kernels were not built; install a C compiler (gcc or clang; on Windows `pip "
            "install ziglang`) and install secateur again",
        )
    tier = loaded.sct_tier().decode()
    reason = "" if tier != "none" else "this processor has neither AVX2 nor NEON with dot products"
    return KernelInfo(tier, loaded.sct_threads(), reason)


def use_tier(tier: str) -> None:
    """Choose one of this processor's tiers, for tests and comparisons.

    Existing matrices work with every tier except `none`.

    Raises:
        KernelError: this processor does not have the tier.
    """
    loaded = library()
    if loaded is None or loaded.sct_use_tier(tier.encode()) != 0:
        raise KernelError(
            f"the kernels of tier {tier!r} cannot run here",
            remedy=f"active is {kernel_info().tier!r}",
        )


def address(tensor: Tensor | None) -> int | None:
    """The address of a contiguous CPU tensor; the caller must keep the tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()
