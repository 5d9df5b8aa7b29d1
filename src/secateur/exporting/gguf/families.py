"""How llama.cpp computes each family that it shares with transformers.

Only what both compute alike is described: the constants that llama.cpp reads, and the reasons for
which it would compute a model differently. Such a model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import gguf

from secateur.exporting.gguf.decoder import LlamaCppDecoder
from secateur.exporting.gguf.rope import rope_of

A = gguf.MODEL_ARCH
SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh",)


def no_constants(decoder: LlamaCppDecoder) -> dict[str, Any]:
    """Nothing beyond the fields of every family."""
    return {}


def no_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """Nothing to refuse."""
    yield from ()


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
    constants: Callable[[LlamaCppDecoder], dict[str, Any]] = no_constants
    differences: Callable[[LlamaCppDecoder], Iterator[str]] = no_differences


LARGEST_GEMMA = {A.GEMMA2: 46, A.GEMMA3: 62}
"""The layers by which llama.cpp recognises the 27B models, whose attention scale differs."""


def gemma_constants(decoder: LlamaCppDecoder) -> dict[str, Any]:
    """Soft caps and sliding windows of Gemma 2 and 3."""
    config = decoder.config
    found: dict[str, Any] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is not None:
            found[name] = float(getattr(config, name))
    if decoder.window:
        found |= {
            "sliding_window": decoder.window,
            "sliding_window_pattern": decoder.window_period,
            "rope_freq_base_swa": float(rope_of(config, "sliding_attention")["rope_theta"]),
        }
    return found


def gemma_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """llama.cpp derives the attention scale of Gemma 2 and 3 from the sizes."""
    config, arch = decoder.config, decoder.arch
    by_heads = decoder.layers == LARGEST_GEMMA[arch]
    theirs = config.hidden_size // decoder.heads[0] if by_heads else decoder.head
    if config.query_pre_attn_scalar != theirs:
        yield (
            f"it divides attention scores by the root of {config.query_pre_attn_scalar}, llama.cpp "
            f"by that of {theirs}"
        )
    if decoder.window and decoder.window_period is None:
        yield "its layers with a sliding window follow no period"
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    if arch == A.GEMMA2 and None in caps:
        yield "it has no soft caps"
    if arch == A.GEMMA3 and caps[0] is not None:
        yield "it has a soft cap on attention scores"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its tokens see those behind them"
    local = rope_of(config, "sliding_attention").get("rope_type")
    if arch == A.GEMMA3 and decoder.window and local != "default":
        yield f"the rotary positions of its local layers are of the kind {local!r}"
    yield from must_be_tied(decoder)


def must_be_tied(decoder: LlamaCppDecoder) -> Iterator[str]:
    """llama.cpp takes the embedding as the head of Gemma."""
    if not decoder.tied:
        yield "its head is not its embedding"


def narrow_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """llama.cpp expects that the heads of some families are as wide as the residual stream."""
    width = decoder.heads[0] * decoder.head
    if width != decoder.config.hidden_size:
        yield f"its heads have {width} channels and its hidden states {decoder.config.hidden_size}"


def granite_constants(decoder: LlamaCppDecoder) -> dict[str, Any]:
    """The four multipliers of Granite."""
    config = decoder.config
    return {
        "attention_scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def smollm3_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """llama.cpp rotates all layers of SmolLM3 but every fourth."""
    if [int(x) for x in decoder.config.no_rope_layers] != [
        int((layer + 1) % 4 != 0) for layer in range(decoder.layers)
    ]:
        yield "its layers without rotary positions are not every fourth"


def expert_constants(decoder: LlamaCppDecoder) -> dict[str, Any]:
    """Numbers and sizes of experts."""
    found = {
        "expert_count": decoder.experts,
        "expert_used_count": decoder.config.num_experts_per_tok,
        "expert_feed_forward_length": decoder.ffn[0],
    }
    shared = getattr(decoder.config, "shared_expert_intermediate_size", None)
    return found | ({"expert_shared_feed_forward_length": shared} if shared else {})


def qwen2_moe_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """llama.cpp does not divide the weights of the chosen experts of Qwen2-MoE by their sum."""
    if decoder.config.norm_topk_prob:
        yield "it divides the weights of the chosen experts by their sum"
    yield from narrow_differences(decoder)


def qwen3_moe_differences(decoder: LlamaCppDecoder) -> Iterator[str]:
    """llama.cpp divides them for Qwen3-MoE."""
    if not decoder.config.norm_topk_prob:
        yield "it does not divide the weights of the chosen experts by their sum"


LLAMA_CPP_FAMILIES = MappingProxyType(
    {
        "llama": LlamaCppFamily(A.LLAMA, interleaved=True, varied=A.DECI),
        "mistral": LlamaCppFamily(A.LLAMA, interleaved=True, varied=A.DECI),
        "qwen2": LlamaCppFamily(A.QWEN2),
        "qwen3": LlamaCppFamily(A.QWEN3),
        "gemma": LlamaCppFamily(
            A.GEMMA, activations=GELU_TANH, norm_shift=1.0, differences=must_be_tied
        ),
        "gemma2": LlamaCppFamily(
            A.GEMMA2,
            activations=GELU_TANH,
            norm_shift=1.0,
            windows=True,
            constants=gemma_constants,
            differences=gemma_differences,
        ),
        "gemma3_text": LlamaCppFamily(
            A.GEMMA3,
            activations=GELU_TANH,
            norm_shift=1.0,
            windows=True,
            constants=gemma_constants,
            differences=gemma_differences,
        ),
        "phi3": LlamaCppFamily(A.PHI3, differences=narrow_differences),
        "granite": LlamaCppFamily(A.GRANITE, interleaved=True, constants=granite_constants),
        "smollm3": LlamaCppFamily(A.SMOLLM3, interleaved=True, differences=smollm3_differences),
        "mixtral": LlamaCppFamily(A.LLAMA, interleaved=True, constants=expert_constants),
        "qwen2_moe": LlamaCppFamily(
            A.QWEN2MOE,
            own_head=True,
            constants=expert_constants,
            differences=qwen2_moe_differences,
        ),
        "qwen3_moe": LlamaCppFamily(
            A.QWEN3MOE, constants=expert_constants, differences=qwen3_moe_differences
        ),
    }
)
"""By the model type of transformers."""
