"""What a model is in llama.cpp: its description, its fields and its tensors.

A layer that predicts further tokens (MTP) follows the decoder layers. Rotary positions of a kind
that llama.cpp computes differently are refused. Its factors divide the frequencies of the pairs of
channels: θ_i = base^(−2i/d) / factor_i.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.errors import ExportError
from secateur.exporting import ExportSource
from secateur.exporting.folder import ELSEWHERE
from secateur.models.checkpoint import CheckpointReader
from secateur.models.mtp import ROLES
from secateur.models.shape import DecoderSizes

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
"""A tensor of a layer: its number, and the rest of the name."""

OF_MTP = {alias: names[0] for names in ROLES.values() for alias in names}
"""GLM's names of what a layer has besides a decoder layer."""

PLACES = MappingProxyType(
    {
        "linear_attn.dt_bias": "ssm_dt.bias",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        "layer_scalar": "layer_output_scale.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        **{f"{x}.weight": f"nextn.{x.replace('.', '_')}.weight" for x in OF_MTP.values()},
    }
)
"""Tensors of a layer that gguf's tables do not name, or not for every architecture."""


CONSTANTS = MappingProxyType({
    "rms_norm_eps": "layer_norm_rms_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention_scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count", "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
    "linear_conv_kernel_dim": "ssm_conv_kernel", "linear_key_head_dim": "ssm_state_size",
    "linear_num_key_heads": "ssm_group_count", "linear_num_value_heads": "ssm_time_step_rank",
    "num_kv_shared_layers": "shared_kv_layers",
})  # fmt: skip
"""What the writer of gguf calls constants of a configuration."""


@dataclass(frozen=True)
class LlamaCppFamily:
    """A family of models in llama.cpp.

    Attributes:
        arch: its architecture.
        interleaved: whether llama.cpp rotates neighbouring channels of a head. transformers rotates
            its halves.
        activations: names of the activation that llama.cpp computes.
        norm_shift: what transformers adds to the weights of norms. llama.cpp adds nothing.
        windows: whether llama.cpp applies sliding windows.
        partial: whether a part of each head may be rotated.
        varied: the architecture for layers of different sizes, if there is one.
        dense_first: whether the first layers may be without experts.
        predicts: whether llama.cpp runs a layer that predicts further tokens (MTP).
        own_head: whether the file must have a head, even if it is the embedding.
        arranged: a tensor in llama.cpp's order, by its name in a model of text alone.
        constants: `{field: value}`; a field is what follows `add_` in the writer of gguf, or a key.
        differences: why llama.cpp would compute a model differently.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    norm_shift: float = 0.0
    windows: bool = False
    partial: bool = False
    varied: gguf.MODEL_ARCH | None = None
    dense_first: bool = False
    predicts: bool = False
    own_head: bool = False
    arranged: Callable[[LlamaCppModel, str, Tensor], Tensor] = lambda model, name, weight: weight
    constants: Callable[[LlamaCppModel], dict[str, Any]] = lambda model: {}
    differences: Callable[[LlamaCppModel], Iterator[str]] = lambda model: iter(())


@dataclass(frozen=True, kw_only=True)
class LlamaCppModel(DecoderSizes):
    """A model in the terms of llama.cpp.

    A block is a decoder layer, or the layer for further tokens behind them.

    Attributes:
        family: how llama.cpp computes it.
        config: the configuration of the base class, with the defaults of transformers.
        names: what a model of text alone calls each stored tensor (`text_names`).
        shapes: of these, by that name.
        stacks: the stored tensors of experts that the file stacks, by the name of the stack.
        blocks: how many there are.
        heads_of: channels of a head of each block.
        heads: query heads of each block; 0 where there is no attention.
        kv_heads: KV heads of each block.
        ffn: FFN neurons of each block; 0 where there is no FFN.
        expert_ffn: neurons of each expert.
        dense: blocks before the first one with experts.
    """

    family: LlamaCppFamily
    config: Any
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    stacks: Mapping[str, tuple[str, ...]]
    blocks: int
    heads_of: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    expert_ffn: int = 0
    dense: int = 0

    @property
    def arch(self) -> gguf.MODEL_ARCH:
        """Its architecture there."""
        return self.family.varied if self.varied and self.family.varied else self.family.arch

    @property
    def head(self) -> int:
        """Channels of a head, in the layers that see all positions."""
        everywhere = self.layers_of("full_attention") or (0,)
        return self.heads_of[everywhere[-1]]

    @property
    def shared_ffn(self) -> int | None:
        """Neurons of Qwen's shared expert."""
        shape = self.shapes.get("model.layers.0.mlp.shared_expert.down_proj.weight")
        return shape[1] if shape else None

    @property
    def varied(self) -> bool:
        """Whether its layers differ in size or lack a sub-block."""
        return any(
            len(set(each)) > 1 or 0 in each for each in (self.heads, self.kv_heads, self.ffn)
        )

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """The decoder layers with attention of a kind."""
        kinds = getattr(self.config, "layer_types", None) or ()
        return tuple(layer for layer, own in enumerate(kinds) if own == kind)

    def rope(self, kind: str = "full_attention") -> dict[str, Any]:
        """The parameters of the rotary positions of the layers of a kind."""
        found = self.config.rope_parameters
        return dict(found.get(kind, found))

    @property
    def window(self) -> int | None:
        """The sliding window of some or all layers; None if there is none."""
        if getattr(self.config, "layer_types", None) and not self.layers_of("sliding_attention"):
            return None
        return getattr(self.config, "sliding_window", None) or None

    def period(self, kind: str) -> int | None:
        """The period p, where all layers but every p-th one are of a kind; None without one."""
        found, layers = self.layers_of(kind), range(self.layers)
        # a period beyond the last layer: all of them are
        for period in range(1, len(layers) + 2):
            if found == tuple(layer for layer in layers if layer % period < period - 1):
                return period
        return None

    @property
    def ignored_window(self) -> int | None:
        """The sliding window, where llama.cpp does not apply it."""
        return None if self.family.windows else self.window

    @property
    def context(self) -> int:
        """The positions for which llama.cpp computes like transformers."""
        positions = int(self.config.max_position_embeddings)
        return min(positions, self.ignored_window or positions, self.stretched_from or positions)

    @property
    def stretched_from(self) -> int | None:
        """The longest context in which llama.cpp rotates as transformers does with LongRoPE.

        transformers takes the short factors for texts up to the original context, llama.cpp for
        contexts up to that. None for other kinds.
        """
        return _original_context(self) if self.rope()["rope_type"] == "longrope" else None

    def fields(self) -> dict[str, Any]:
        """The sizes and constants that llama.cpp reads, as in `LlamaCppVocabulary.fields`."""
        sizes = {
            "head_count": self.heads,
            "head_count_kv": self.kv_heads,
            "feed_forward_length": [width or LEAST_FFN for width in self.ffn],
        }
        predicting = self.blocks - self.layers
        known = {field: getattr(self.config, key, None) for key, field in CONSTANTS.items()}
        known |= {
            "expert_count": self.experts or None,
            "expert_feed_forward_length": self.expert_ffn or None,
            "expert_shared_feed_forward_length": self.shared_ffn,
        }
        return {
            **{field: value for field, value in known.items() if value is not None},
            "block_count": self.blocks,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "vocab_size": self.vocabulary,
            "key_length": self.head,
            "value_length": self.head,
            **{name: list(of) if len(set(of)) > 1 else of[0] for name, of in sizes.items()},
            **_rope_constants(self),
            **({"nextn_predict_layers": predicting} if predicting else {}),
            **self.family.constants(self),
        }

    def tensors(self, source: ExportSource) -> Iterator[Planned]:
        """Every tensor of the file that the source stores.

        Raises:
            ExportError: llama.cpp has no place for a tensor.
        """
        tables = gguf.get_tensor_name_map(self.arch, self.blocks)
        of_experts = {stored for group in self.stacks.values() for stored in group}
        plain = {name: stored for stored, name in self.names.items() if stored not in of_experts}
        if self.tied:  # the file has no head then, unless llama.cpp looks for one
            plain.pop("lm_head.weight", None)
            if self.family.own_head:
                plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
        for name, stored in plain.items():
            layer = LAYER.fullmatch(name)
            own = PLACES.get(layer[2]) if layer else None
            known = tables.get_name(name, try_suffixes=(".weight", ".bias"))
            if layer and own:
                known = f"blk.{layer[1]}.{own}"
            if known is None:
                raise unwritten(source, f"llama.cpp has no place for the tensor {stored!r}")
            weight = torch.empty(self.shapes[self.names[stored]], device="meta")
            yield Planned(known, (stored,), tuple(self.arranged(stored, weight).shape))
        for name, group in self.stacks.items():
            yield Planned(name, group, (len(group), *self.shapes[self.names[group[0]]]))

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the source does not store."""
        hidden = self.hidden
        for layer, width in enumerate(self.ffn):
            if width == 0:
                yield f"blk.{layer}.ffn_norm.weight", torch.ones(hidden)
                for name in ("gate", "up"):
                    yield f"blk.{layer}.ffn_{name}.weight", torch.zeros(LEAST_FFN, hidden)
                yield f"blk.{layer}.ffn_down.weight", torch.zeros(hidden, LEAST_FFN)
        yield from _rope_tensors(self)

    def read(self, reader: CheckpointReader, one: Planned) -> Tensor:
        """A tensor of the source as llama.cpp expects it, float32."""
        parts = [self.arranged(name, reader.read(name)).float() for name in one.sources]
        return torch.stack(parts) if len(one.shape) == 3 else parts[0]

    def arranged(self, stored: str, weight: Tensor) -> Tensor:
        """A tensor of the source with its channels in llama.cpp's order, norms with their shift.

        Args:
            stored: its name in the source.
            weight: [out, in], or [out] for a bias or a norm. A side of length 1 stays.
        """
        name = self.names[stored]
        owner = name.rpartition(".")[0]
        if self.family.norm_shift and re.search(r"(?<!linear_attn\.)norm$", owner):
            return weight.float() + self.family.norm_shift
        if not self.family.interleaved or not owner.endswith(("q_proj", "k_proj")):
            return self.family.arranged(self, name, weight)
        # [heads, 2, half of a head, …]: transformers rotates the two halves, llama.cpp neighbours
        halves = weight.reshape(-1, 2, self.head // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    def moves_whole(self, stored: str, columns: int, size: int) -> bool:
        """Whether llama.cpp's order of a tensor's columns keeps each `size` of them together."""
        places = torch.arange(columns)
        moved = self.family.arranged(self, self.names[stored], places[None]).view(-1, size)
        return bool((moved == moved[:, :1] // size * size + places[:size]).all())


LEAST_FFN = 32
"""llama.cpp skips a layer whose FFN is 0 wide, so a missing FFN becomes this many zeros."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file.

    Attributes:
        name: in GGUF.
        sources: its name in the source; one for each expert where the file stacks experts; none for
            a tensor that the source does not store.
        shape: its shape.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]


def unwritten(source: ExportSource, why: str) -> ExportError:
    """The error for a model of which no file is written."""
    return ExportError(why, where=str(source.folder), remedy=ELSEWHERE)


KINDS = ("default", "linear", "yarn", "llama3", "longrope", "proportional")


def _rotated(model: LlamaCppModel) -> int:
    """The channels of a head that are rotated."""
    return int(model.head * model.rope().get("partial_rotary_factor", 1.0))


def _original_context(model: LlamaCppModel) -> int:
    """The context of the model before its positions were stretched."""
    config, rope = model.config, model.rope()
    stretched = rope.get("original_max_position_embeddings")
    return int(stretched or config.original_max_position_embeddings)


def _rope_constants(model: LlamaCppModel) -> dict[str, Any]:
    """The fields of the rotary positions."""
    rope = model.rope()
    found: dict[str, Any] = {
        "rope_dimension_count": _rotated(model),
        "rope_freq_base": float(rope["rope_theta"]),
    }
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found["rope_scaling_type"] = gguf.RopeScalingType(kind)
        found["rope_scaling_factor"] = float(rope["factor"])
    if kind in ("yarn", "longrope"):
        found["rope_scaling_orig_ctx_len"] = _original_context(model)
    if kind == "longrope":
        # LongRoPE multiplies sine and cosine by √(1 + ln s / ln original), s the stretching
        original, factor = _original_context(model), rope.get("attention_factor")
        stretched = rope.get("factor") or model.config.max_position_embeddings / original
        if factor is None:
            more = math.log(stretched) / math.log(original) if stretched > 1 else 0.0
            factor = math.sqrt(1 + more)
        found["rope_scaling_attn_factors"] = float(factor)
    return found


def _rope_tensors(model: LlamaCppModel) -> Iterator[tuple[str, Tensor]]:
    """The factors of the frequencies, float32 [rotated / 2]."""
    rope = model.rope()
    if rope["rope_type"] == "llama3":  # slow pairs are stretched by `factor`, fast ones not at all
        powers = torch.arange(0, _rotated(model), 2, dtype=torch.float64) / _rotated(model)
        factor, context = rope["factor"], rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        # how often each pair of channels turns around within the original context
        turns = context * (1 / rope["rope_theta"] ** powers) / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).float()
    if rope["rope_type"] == "proportional":  # the first pairs of a head turn, and the others do not
        turning = _rotated(model) // 2
        factors = [1.0] * turning + [1e30] * (model.head // 2 - turning)
        yield "rope_freqs.weight", torch.tensor(factors)
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"]).float()


def rope_differences(model: LlamaCppModel) -> Iterator[str]:
    """Why llama.cpp would compute other rotary positions."""
    rope = model.rope()
    kind, arch = rope["rope_type"], model.arch
    only = {"longrope": gguf.MODEL_ARCH.PHI3, "proportional": gguf.MODEL_ARCH.GEMMA4}
    if kind not in KINDS or only.get(kind, arch) != arch:
        yield f"its rotary positions are of the kind {kind!r}"
    odd = sorted({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & rope.keys())
    if kind == "yarn" and odd:
        yield f"its rotary positions set {', '.join(odd)}"
    if _rotated(model) != model.head and not model.family.partial:
        yield "only a part of each head is rotated"
