"""What a model is in llama.cpp: its description, its fields and its tensors.

Families are described where llama.cpp and transformers compute alike: the constants that llama.cpp
reads, and the reasons for which it would compute a model differently. Such a model is refused, and
so are rotary positions of a kind that llama.cpp computes differently. Its factors divide the
frequencies of the pairs of channels: θ_i = base^(−2i/d) / factor_i.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.errors import ExportError
from secateur.exporting import ExportSource
from secateur.exporting.folder import ELSEWHERE
from secateur.models.architecture import family_of_type
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import transformers_errors
from secateur.models.shape import DecoderSizes


@dataclass(frozen=True, kw_only=True)
class LlamaCppModel(DecoderSizes):
    """A model in the terms of llama.cpp.

    Attributes:
        arch: its architecture there.
        family: how llama.cpp computes it.
        config: the configuration of the base class, with the defaults of transformers.
        head: channels of a head.
        heads: query heads of each layer; 0 where there is no attention.
        kv_heads: KV heads of each layer.
        ffn: FFN neurons of each layer, or of each expert; 0 where there is no FFN.
    """

    arch: gguf.MODEL_ARCH
    family: _LlamaCppFamily
    config: Any
    head: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]

    @property
    def varied(self) -> bool:
        """Whether its layers differ in size or lack a sub-block."""
        return any(
            len(set(each)) > 1 or 0 in each for each in (self.heads, self.kv_heads, self.ffn)
        )

    @property
    def window(self) -> int | None:
        """The sliding window of some or all layers; None if there is none."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds and "sliding_attention" not in kinds:
            return None
        return getattr(self.config, "sliding_window", None) or None

    @property
    def window_period(self) -> int | None:
        """The period p, where every p-th layer sees all positions; None without such a period."""
        sliding = [kind == "sliding_attention" for kind in self.config.layer_types]
        layers = range(len(sliding))
        # a period beyond the last layer: all of them slide
        for period in range(1, len(sliding) + 2):
            if sliding == [layer % period < period - 1 for layer in layers]:
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
        long = _rope_of(self.config)["rope_type"] == "longrope"
        return _original_context(self) if long else None

    def fields(self) -> dict[str, Any]:
        """The sizes and constants that llama.cpp reads, as in `LlamaCppVocabulary.fields`."""
        per_layer = self.arch == self.family.varied
        fields = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "vocab_size": self.vocabulary,
            "key_length": self.head,
            "value_length": self.head,
            "layer_norm_rms_eps": self.config.rms_norm_eps,
            **_rope_constants(self),
            **self.family.constants(self),
        }
        sizes = {
            "head_count": self.heads,
            "head_count_kv": self.kv_heads,
            "feed_forward_length": [width or LEAST_FFN for width in self.ffn],
        }
        return fields | {name: list(of) if per_layer else of[0] for name, of in sizes.items()}

    def tensors(self, source: ExportSource) -> Iterator[Planned]:
        """Every tensor of the file that the source stores.

        Raises:
            ExportError: llama.cpp has no place for a tensor.
        """
        names = gguf.get_tensor_name_map(self.arch, self.layers)
        entries = source.reader.entries
        stacked = _stacked_experts(source)
        of_experts = {name for group in stacked.values() for name in group}
        plain = {name: (name,) for name in entries if name not in of_experts}
        if self.tied:  # the file has no head then, unless llama.cpp looks for one
            plain.pop("lm_head.weight", None)
            if self.family.own_head:
                plain["lm_head.weight"] = ("model.embed_tokens.weight",)
        for name, group in {**plain, **stacked}.items():
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ExportError(
                    f"llama.cpp has no place for the tensor {name!r}",
                    where=str(source.folder),
                    remedy=ELSEWHERE,
                )
            shape = entries[group[0]].shape
            yield Planned(known, group, (len(group), *shape) if name in stacked else shape)

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

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source with its channels in llama.cpp's order, norms with their shift.

        Args:
            name: in the source.
            weight: [out, in], or [out] for a bias or a norm.
        """
        owner = name.rpartition(".")[0]
        if self.family.norm_shift and owner.endswith("norm"):
            return weight.float() + self.family.norm_shift
        if not self.family.interleaved or not owner.endswith(("q_proj", "k_proj")):
            return weight
        # [heads, 2, half of a head, …]: transformers rotates the two halves, llama.cpp neighbours
        halves = weight.reshape(-1, 2, self.head // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)


A = gguf.MODEL_ARCH
SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class _LlamaCppFamily:
    """A family of models in llama.cpp.

    Attributes:
        arch: its architecture.
        interleaved: whether llama.cpp rotates neighbouring channels of a head. transformers rotates
            its halves.
        activations: names of the activation that llama.cpp computes.
        norm_shift: what transformers adds to the weights of norms. llama.cpp adds nothing.
        windows: whether llama.cpp applies sliding windows.
        varied: the architecture for layers of different sizes, if there is one.
        own_head: whether the file must have a head, even if it is the embedding.
        constants: `{field: value}`; a field is what follows `add_` in the writer of gguf.
        differences: why llama.cpp would compute a model differently.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    activations: tuple[str, ...] = SILU
    norm_shift: float = 0.0
    windows: bool = False
    varied: gguf.MODEL_ARCH | None = None
    own_head: bool = False
    constants: Callable[[LlamaCppModel], dict[str, Any]] = lambda model: {}
    differences: Callable[[LlamaCppModel], Iterator[str]] = lambda model: iter(())


LARGEST_GEMMA = {A.GEMMA2: 46, A.GEMMA3: 62}
"""The layers by which llama.cpp recognises the 27B models, whose attention scale differs."""


def _gemma_constants(model: LlamaCppModel) -> dict[str, Any]:
    """Soft caps and sliding windows of Gemma 2 and 3."""
    config = model.config
    found: dict[str, Any] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is not None:
            found[name] = float(getattr(config, name))
    if model.window:
        found |= {
            "sliding_window": model.window,
            "sliding_window_pattern": model.window_period,
            "rope_freq_base_swa": float(_rope_of(config, "sliding_attention")["rope_theta"]),
        }
    return found


def _gemma_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp derives the attention scale of Gemma 2 and 3 from the sizes."""
    config, arch = model.config, model.arch
    # llama.cpp takes the hidden size by heads for the 27B models, and the size of a head else
    by_heads = model.layers == LARGEST_GEMMA[arch]
    theirs = config.hidden_size // model.heads[0] if by_heads else model.head
    if config.query_pre_attn_scalar != theirs:
        yield (
            f"it divides attention scores by the root of {config.query_pre_attn_scalar}, llama.cpp "
            f"by that of {theirs}"
        )
    if model.window and model.window_period is None:
        yield "its layers with a sliding window follow no period"
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    if arch == A.GEMMA2 and None in caps:
        yield "it has no soft caps"
    if arch == A.GEMMA3 and caps[0] is not None:
        yield "it has a soft cap on attention scores"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its tokens see those behind them"
    local = _rope_of(config, "sliding_attention").get("rope_type")
    if arch == A.GEMMA3 and model.window and local != "default":
        yield f"the rotary positions of its local layers are of the kind {local!r}"
    yield from _must_be_tied(model)


def _must_be_tied(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp takes the embedding as the head of Gemma."""
    if not model.tied:
        yield "its head is not its embedding"


def _narrow_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp expects that the heads of some families are as wide as the residual stream."""
    width = model.heads[0] * model.head
    if width != model.hidden:
        yield f"its heads have {width} channels and its hidden states {model.hidden}"


def _granite_constants(model: LlamaCppModel) -> dict[str, Any]:
    """The four multipliers of Granite."""
    config = model.config
    return {
        "attention_scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _smollm3_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp rotates all layers of SmolLM3 but every fourth."""
    if [int(x) for x in model.config.no_rope_layers] != [
        int((layer + 1) % 4 != 0) for layer in range(model.layers)
    ]:
        yield "its layers without rotary positions are not every fourth"


def _expert_constants(model: LlamaCppModel) -> dict[str, Any]:
    """Numbers and sizes of experts."""
    found = {
        "expert_count": model.experts,
        "expert_used_count": model.config.num_experts_per_tok,
        "expert_feed_forward_length": model.ffn[0],
    }
    shared = getattr(model.config, "shared_expert_intermediate_size", None)
    return found | ({"expert_shared_feed_forward_length": shared} if shared else {})


def _qwen_moe_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp divides the weights of the chosen experts by their sum for Qwen3-MoE alone."""
    divides = model.arch == A.QWEN3MOE
    if bool(model.config.norm_topk_prob) != divides:
        verb = "does not divide" if divides else "divides"
        yield f"it {verb} the weights of the chosen experts by their sum"
    if not divides:
        yield from _narrow_differences(model)


GEMMA2 = _LlamaCppFamily(
    A.GEMMA2,
    activations=GELU_TANH,
    norm_shift=1.0,
    windows=True,
    constants=_gemma_constants,
    differences=_gemma_differences,
)

LLAMA_CPP_FAMILIES = MappingProxyType(
    {
        "llama": _LlamaCppFamily(A.LLAMA, interleaved=True, varied=A.DECI),
        "mistral": _LlamaCppFamily(A.LLAMA, interleaved=True, varied=A.DECI),
        "qwen2": _LlamaCppFamily(A.QWEN2),
        "qwen3": _LlamaCppFamily(A.QWEN3),
        "gemma": _LlamaCppFamily(
            A.GEMMA, activations=GELU_TANH, norm_shift=1.0, differences=_must_be_tied
        ),
        "gemma2": GEMMA2,
        "gemma3_text": replace(GEMMA2, arch=A.GEMMA3),
        "phi3": _LlamaCppFamily(A.PHI3, differences=_narrow_differences),
        "granite": _LlamaCppFamily(A.GRANITE, interleaved=True, constants=_granite_constants),
        "smollm3": _LlamaCppFamily(A.SMOLLM3, interleaved=True, differences=_smollm3_differences),
        "mixtral": _LlamaCppFamily(A.LLAMA, interleaved=True, constants=_expert_constants),
        "qwen2_moe": _LlamaCppFamily(
            A.QWEN2MOE,
            own_head=True,
            constants=_expert_constants,
            differences=_qwen_moe_differences,
        ),
        "qwen3_moe": _LlamaCppFamily(
            A.QWEN3MOE, constants=_expert_constants, differences=_qwen_moe_differences
        ),
    }
)
"""By the model type of transformers."""


LEAST_FFN = 32
"""llama.cpp skips a layer whose FFN is 0 wide, so a missing FFN becomes this many zeros."""

OURS = ("model_type", "base_model_type", "architectures", "secateur_cut", "quantization_config")
"""Keys of `config.json` that the configuration of the base class does not have."""


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


def model_of(source: ExportSource) -> LlamaCppModel:
    """Describe the model of a folder for llama.cpp.

    Raises:
        ExportError: llama.cpp does not know it, or computes it differently.
    """
    from transformers import AutoConfig

    kind = model_type(source)
    family = LLAMA_CPP_FAMILIES.get(kind)
    if family is None:
        raise _differs(source, f"models of type {kind!r} are not described for it here")
    declared = family_of_type(kind)
    if declared and declared.experts:
        declared.experts.split(source.reader, {name: name for name in source.reader.entries})
    own = {key: value for key, value in source.config.items() if key not in OURS}
    with transformers_errors(source.folder):
        config = AutoConfig.for_model(kind, **own)
    model = _sizes_of(source, family, config)
    if model.varied:
        if family.varied is None:
            raise _differs(source, f"its layers differ in size, which it does not allow of {kind}")
        model = replace(model, arch=family.varied)
    names = ("hidden_activation", "hidden_act")
    activation = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if activation not in family.activations:
        raise _differs(source, f"the activation is {activation}")
    for why in (*_rope_differences(model), *family.differences(model)):
        raise _differs(source, why)
    list(model.tensors(source))  # refuses tensors without a place
    return model


def model_type(source: ExportSource) -> str:
    """The type of the base class."""
    return str(source.config.get("base_model_type", source.config.get("model_type")))


def _sizes_of(source: ExportSource, family: _LlamaCppFamily, config: Any) -> LlamaCppModel:
    """The sizes of a model, read off its tensors."""
    entries, layers = source.reader.entries, range(config.num_hidden_layers)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stacked = _stacked_experts(source)

    def side(part: str, number: int) -> tuple[int, ...]:
        names = [f"model.layers.{layer}.{part}.weight" for layer in layers]
        return tuple(entries[name].shape[number] if name in entries else 0 for name in names)

    heads = tuple(width // head for width in side("self_attn.o_proj", 1))
    fused = tuple(rows // head for rows in side("self_attn.qkv_proj", 0))
    separate = tuple(rows // head for rows in side("self_attn.k_proj", 0))
    # a fused projection has the queries, then as many keys as values
    kv_heads = tuple((f - h) // 2 for f, h in zip(fused, heads, strict=True))
    ffn, count = side("mlp.down_proj", 1), 0
    if stacked:
        downs = [stacked.get(f"model.layers.{n}.mlp.experts.down_proj.weight", ()) for n in layers]
        ffn = tuple(entries[down[0]].shape[1] if down else 0 for down in downs)
        counts = {len(down) for down in downs}
        if len(counts) > 1:
            raise _differs(source, f"its layers have {sorted(counts)} experts")
        (count,) = counts
    return LlamaCppModel(
        arch=family.arch,
        family=family,
        config=config,
        layers=len(layers),
        hidden=config.hidden_size,
        head=head,
        heads=heads,
        kv_heads=kv_heads if any(fused) else separate,
        ffn=ffn,
        vocabulary=entries["model.embed_tokens.weight"].shape[0],
        tied=bool(config.tie_word_embeddings) or "lm_head.weight" not in entries,
        experts=count,
    )


def _stacked_experts(source: ExportSource) -> dict[str, tuple[str, ...]]:
    """The experts' matrices that the file stacks: {name of the stack: names in the source}."""
    family = family_of_type(model_type(source))
    experts = family and family.experts
    if not experts:
        return {}
    found: dict[str, dict[int, str]] = {}
    for name in source.reader.entries:
        layer = re.match(r"model\.layers\.\d+", name)
        place, linear = experts.place_of(name), experts.stored_linear(name)
        if layer and place and linear:
            stack = f"{layer[0]}.mlp.experts.{linear}.weight"
            found.setdefault(stack, {})[int(place[1])] = name
    return {stack: tuple(of[e] for e in sorted(of)) for stack, of in found.items()}


KINDS = ("default", "linear", "yarn", "llama3", "longrope")


def _rope_of(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """The parameters of the rotary positions."""
    found = config.rope_parameters
    return dict(found.get(kind, found))


def _rotated(model: LlamaCppModel) -> int:
    """The channels of a head that are rotated."""
    return int(model.head * _rope_of(model.config).get("partial_rotary_factor", 1.0))


def _original_context(model: LlamaCppModel) -> int:
    """The context of the model before its positions were stretched."""
    config, rope = model.config, _rope_of(model.config)
    stretched = rope.get("original_max_position_embeddings")
    return int(stretched or config.original_max_position_embeddings)


def _rope_constants(model: LlamaCppModel) -> dict[str, Any]:
    """The fields of the rotary positions."""
    rope = _rope_of(model.config)
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
    rope = _rope_of(model.config)
    if rope["rope_type"] == "llama3":  # slow pairs are stretched by `factor`, fast ones not at all
        powers = torch.arange(0, _rotated(model), 2, dtype=torch.float64) / _rotated(model)
        factor, context = rope["factor"], rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        # how often each pair of channels turns around within the original context
        turns = context * (1 / rope["rope_theta"] ** powers) / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).float()
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"]).float()


def _rope_differences(model: LlamaCppModel) -> Iterator[str]:
    """Why llama.cpp would compute other rotary positions."""
    rope = _rope_of(model.config)
    kind, arch = rope["rope_type"], model.arch
    if kind not in KINDS or (kind == "longrope") > (arch == gguf.MODEL_ARCH.PHI3):
        yield f"its rotary positions are of the kind {kind!r}"
    odd = sorted({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"} & rope.keys())
    if kind == "yarn" and odd:
        yield f"its rotary positions set {', '.join(odd)}"
    if _rotated(model) != model.head and arch != gguf.MODEL_ARCH.PHI3:
        yield "only a part of each head is rotated"


def _differs(source: ExportSource, why: str) -> ExportError:
    """The error for a model that llama.cpp would not compute alike."""
    return ExportError(
        f"llama.cpp would not compute this model like transformers: {why}",
        where=str(source.folder),
        remedy=ELSEWHERE,
    )


def refused(why: str, where: str) -> ExportError:
    """The error for a tokenizer that a GGUF file cannot describe."""
    return ExportError(
        f"llama.cpp would not tokenize like this model: {why}",
        where=where,
        remedy="export it with --to compressed-tensors, which keeps the files of the tokenizer; to "
        "try it all the same, use llama.cpp's own converter",
    )
