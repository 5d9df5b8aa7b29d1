"""Rotary positions: the fields and factors that llama.cpp reads for each kind.

A kind that llama.cpp computes differently is refused. Its factors divide the frequencies of the
pairs of channels: θ_i = base^(−2i/d) / factor_i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.exporting.gguf.decoder import LlamaCppDecoder

KINDS = ("default", "linear", "yarn", "llama3", "longrope")


def rope_of(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """The parameters of the rotary positions.

    Args:
        config: the configuration.
        kind: of the layers, where a model has a table for each kind of attention.
    """
    found = config.rope_parameters
    return dict(found.get(kind, found))


def rotated(decoder: LlamaCppDecoder) -> int:
    """The channels of a head that are rotated."""
    return int(decoder.head * rope_of(decoder.config).get("partial_rotary_factor", 1.0))


def long_rope_start(decoder: LlamaCppDecoder) -> int | None:
    """The longest context in which llama.cpp rotates as transformers does with LongRoPE.

    transformers takes the short factors for texts up to the original context, llama.cpp for
    contexts up to that. None for other kinds.
    """
    long = rope_of(decoder.config)["rope_type"] == "longrope"
    return original_context(decoder) if long else None


def original_context(decoder: LlamaCppDecoder) -> int:
    """The context of the model before its positions were stretched."""
    config, rope = decoder.config, rope_of(decoder.config)
    stretched = rope.get("original_max_position_embeddings")
    return int(stretched or config.original_max_position_embeddings)


def rope_constants(decoder: LlamaCppDecoder) -> dict[str, Any]:
    """The fields of the rotary positions."""
    rope = rope_of(decoder.config)
    found: dict[str, Any] = {
        "rope_dimension_count": rotated(decoder),
        "rope_freq_base": float(rope["rope_theta"]),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found["rope_scaling_type"] = gguf.RopeScalingType(kind)
        found["rope_scaling_factor"] = float(rope["factor"])
    if kind in ("yarn", "longrope"):
        found["rope_scaling_orig_ctx_len"] = original_context(decoder)
    if kind == "longrope":
        found["rope_scaling_attn_factors"] = long_attention_factor(decoder)
    return found


def long_attention_factor(decoder: LlamaCppDecoder) -> float:
    """What LongRoPE multiplies sine and cosine by: √(1 + ln s / ln original), s the stretching."""
    rope, original = rope_of(decoder.config), original_context(decoder)
    stretched = rope.get("factor") or decoder.config.max_position_embeddings / original
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0


def rope_tensors(decoder: LlamaCppDecoder) -> Iterator[tuple[str, Tensor]]:
    """The factors of the frequencies, float32 [rotated / 2]."""
    rope = rope_of(decoder.config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3_factors(rope, rotated(decoder))
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"]).float()


def llama3_factors(rope: Mapping[str, Any], size: int) -> Tensor:
    """The factors by which Llama 3 stretches each frequency, float32 [size / 2]."""
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = context * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def rope_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """Why llama.cpp would compute other rotary positions."""
    rope = rope_of(decoder.config)
    kind, arch = rope["rope_type"], decoder.arch
    if kind not in KINDS or (kind == "longrope") > (arch == gguf.MODEL_ARCH.PHI3):
        yield f"its rotary positions are of the kind {kind!r}"
    odd = sorted({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & rope.keys())
    if kind == "yarn" and odd:
        yield f"its rotary positions set {', '.join(odd)}"
    if rotated(decoder) != decoder.head and arch != gguf.MODEL_ARCH.PHI3:
        yield "only a part of each head is rotated"
