"""Qwen3.5 (dense): three layers of gated DeltaNet to one of gated attention."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import EMBEDDING_AND_HEAD, GATED_FFN, TWO_NORMS, Couplings

DELTANET_AXES = {
    "linear_attn.in_proj_qkv": ("state", "hidden"),
    "linear_attn.in_proj_z": ("state", "hidden"),
    "linear_attn.in_proj_b": ("state", "hidden"),
    "linear_attn.in_proj_a": ("state", "hidden"),
    "linear_attn.out_proj": ("hidden", "state"),
    "linear_attn.conv1d": ("state", "state", "state"),
    "linear_attn.norm": ("state",),
    "linear_attn.A_log": ("state",),
    "linear_attn.dt_bias": ("state",),
    "self_attn.q_proj": ("pairs", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "self_attn.q_norm": ("-",),
    "self_attn.k_norm": ("-",),
}
"""Gated DeltaNet, and attention with a gate for every query."""

QWEN3_5 = families.register("qwen3_5")(
    Family(
        model_types=("qwen3_5_text",),
        layers="model.layers",
        groups=(
            tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
            ("linear_attn.out_proj",),
            *SPLIT_ATTENTION_GATED_FFN,
        ),
        writers=("linear_attn.out_proj", *PRE_NORM_WRITERS),
        couplings=Couplings(
            layer={**DELTANET_AXES, **GATED_FFN, **TWO_NORMS},
            outside=EMBEDDING_AND_HEAD,
            attention_norms=("input_layernorm",),
            ffn_norms=("post_attention_layernorm",),
            norm_offset=1.0,
        ),
    )
)
