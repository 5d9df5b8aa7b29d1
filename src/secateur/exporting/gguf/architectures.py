"""How llama.cpp computes each family, and the fields and tensors that it reads for it.

Only what llama.cpp computes like transformers is described. Everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.errors import ArchitectureError
from secateur.exporting import ExportSource

__all__ = ["LlamaCppDecoder", "decoder_of"]

ARCHITECTURES = MappingProxyType(
    {
        "llama": gguf.MODEL_ARCH.LLAMA,
        "mistral": gguf.MODEL_ARCH.LLAMA,
        "qwen2": gguf.MODEL_ARCH.QWEN2,
        "qwen3": gguf.MODEL_ARCH.QWEN3,
    }
)
"""The architecture of llama.cpp for each model type of transformers."""

INTERLEAVED = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.DECI)
"""Architectures that rotate neighbouring channels of a head. transformers rotates its halves."""

LEAST_FFN = 32
"""llama.cpp skips a layer whose FFN is 0 wide, so a missing FFN becomes this many zeros."""

ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True)
class LlamaCppDecoder:
    """A decoder as llama.cpp sees it.

    Attributes:
        arch: its architecture there.
        config: the `config.json` of the base class.
        head: channels of a head.
        heads: query heads of each layer; 0 where there is no attention.
        kv_heads: KV heads of each layer.
        ffn: FFN neurons of each layer; 0 where there is no FFN.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
    """

    arch: gguf.MODEL_ARCH
    config: Mapping[str, Any]
    head: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    vocabulary: int
    tied: bool

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.heads)

    @property
    def rope(self) -> dict[str, Any]:
        """The parameters of the rotary positions."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return {"rope_theta": self.config.get("rope_theta", 10000.0), **found}

    def add_fields(self, writer: gguf.GGUFWriter) -> None:
        """Write the sizes and constants that llama.cpp reads."""
        config, deci = self.config, self.arch == gguf.MODEL_ARCH.DECI
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_vocab_size(self.vocabulary)
        writer.add_head_count(list(self.heads) if deci else self.heads[0])
        writer.add_head_count_kv(list(self.kv_heads) if deci else self.kv_heads[0])
        widths = [width or LEAST_FFN for width in self.ffn]
        writer.add_feed_forward_length(widths if deci else widths[0])
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(float(self.rope["rope_theta"]))
        kind = self.rope.get("rope_type", "default")
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.rope["original_max_position_embeddings"])

    @property
    def window(self) -> int | None:
        """The sliding window of all layers; None if there is none."""
        config = self.config
        on = config.get("use_sliding_window", config["model_type"] == "mistral")
        return config.get("sliding_window") if on else None

    @property
    def context(self) -> int:
        """The positions to use: no more than the sliding window, which llama.cpp ignores."""
        positions = int(self.config["max_position_embeddings"])
        return min(positions, self.window or positions)

    def tensors(self, source: ExportSource) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every stored tensor: its name in GGUF, in the source, and its shape."""
        names = gguf.get_tensor_name_map(self.arch, self.layers)
        for name, entry in source.reader.entries.items():
            if self.tied and name == "lm_head.weight":
                continue
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ArchitectureError(
                    f"llama.cpp has no place for the tensor {name!r}",
                    where=str(source.folder),
                    remedy="export to another target",
                )
            yield known, name, entry.shape

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the source does not store."""
        hidden = self.config["hidden_size"]
        for layer, width in enumerate(self.ffn):
            if width == 0:
                norm = torch.ones(hidden)
                yield f"blk.{layer}.ffn_norm.weight", norm
                for name in ("gate", "up"):
                    yield f"blk.{layer}.ffn_{name}.weight", torch.zeros(LEAST_FFN, hidden)
                yield f"blk.{layer}.ffn_down.weight", torch.zeros(hidden, LEAST_FFN)
        if self.rope.get("rope_type") == "llama3":
            yield "rope_freqs.weight", llama3_factors(self.rope, self.head)

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source in the order of channels that llama.cpp expects.

        Args:
            name: in the source.
            weight: [out, in], or [out] for a bias.
        """
        if self.arch not in INTERLEAVED or ".self_attn." not in name:
            return weight
        if not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            return weight
        halves = weight.reshape(-1, 2, self.head // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(rope: Mapping[str, Any], head: int) -> Tensor:
    """The factors by which Llama 3 stretches each frequency, float32 [head / 2]."""
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = context * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def decoder_of(source: ExportSource) -> LlamaCppDecoder:
    """Describe the model of a folder for llama.cpp.

    Raises:
        ArchitectureError: llama.cpp does not know it, or computes it differently.
    """
    config = dict(source.config)
    kind = config.get("base_model_type", config.get("model_type"))
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise differs(source, f"models of type {kind!r} are not described for it here")
    config["model_type"] = kind
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise differs(source, f"the activation is {config['hidden_act']}")
    layers, shapes = config["num_hidden_layers"], source.reader.entries

    def rows(part: str, each: int = 1) -> tuple[int, ...]:
        names = [f"model.layers.{layer}.{part}.weight" for layer in range(layers)]
        return tuple(shapes[name].shape[0] // each if name in shapes else 0 for name in names)

    heads, kv_heads = rows("self_attn.q_proj", head), rows("self_attn.k_proj", head)
    ffn = rows("mlp.gate_proj")
    arch = ARCHITECTURES[kind]
    if any(len(set(each)) > 1 or 0 in each for each in (heads, kv_heads, ffn)):
        if arch != gguf.MODEL_ARCH.LLAMA:
            raise differs(
                source, f"its layers differ in size, which it allows only of Llama, not {kind}"
            )
        arch = gguf.MODEL_ARCH.DECI
    decoder = LlamaCppDecoder(
        arch,
        config,
        head,
        heads,
        kv_heads,
        ffn,
        vocabulary=shapes["model.embed_tokens.weight"].shape[0],
        tied=bool(config.get("tie_word_embeddings", False)) or "lm_head.weight" not in shapes,
    )
    check_rope(decoder, source)
    list(decoder.tensors(source))  # refuses tensors without a place
    return decoder


def check_rope(decoder: LlamaCppDecoder, source: ExportSource) -> None:
    """Refuse rotary positions that llama.cpp computes differently."""
    rope = decoder.rope
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise differs(source, f"its rotary positions are of the kind {kind!r}")
    odd = sorted({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & rope.keys())
    if kind == "yarn" and odd:
        raise differs(source, f"its rotary positions set {', '.join(odd)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise differs(source, "only a part of each head is rotated")


def differs(source: ExportSource, why: str) -> ArchitectureError:
    """The error for a model that llama.cpp would not compute alike."""
    return ArchitectureError(
        f"llama.cpp would not compute this model like transformers: {why}",
        where=str(source.folder),
        remedy="export to another target",
    )
