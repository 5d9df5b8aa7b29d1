"""LFM2: short convolutions in most layers, attention in the others."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings

LFM2_COUPLINGS = Couplings(
    layer={
        "conv.in_proj": ("state", "hidden"),
        "conv.conv": ("state", "state", "state"),
        "conv.out_proj": ("hidden", "state"),
        "self_attn.q_proj": ("queries", "hidden"),
        "self_attn.k_proj": ("keys", "hidden"),
        "self_attn.v_proj": ("keys", "hidden"),
        "self_attn.out_proj": ("hidden", "queries"),
        "self_attn.q_layernorm": ("-",),
        "self_attn.k_layernorm": ("-",),
        "operator_norm": ("hidden",),
        "feed_forward.w1": ("neurons", "hidden"),
        "feed_forward.w3": ("neurons", "hidden"),
        "feed_forward.w2": ("hidden", "neurons"),
        "ffn_norm": ("hidden",),
    },
    outside={
        "model.embed_tokens": ("-", "hidden"),
        "model.embedding_norm": ("hidden",),
        "lm_head": ("-", "hidden"),
    },
    ffn=("feed_forward",),
    ffn_norms=("ffn_norm",),
    with_neurons={"block_auto_adjust_ff_dim": False},
    fixed={"hidden": "its convolutions run over the residual stream's channels"},
)
"""Attention, short convolutions and a gated feed-forward."""

LFM2 = families.register("lfm2")(
    Family(
        model_types=("lfm2",),
        layers="model.layers",
        groups=(
            ("conv.in_proj",),
            ("conv.out_proj",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("feed_forward.w1", "feed_forward.w3"),
            ("feed_forward.w2",),
        ),
        writers=("conv.out_proj", "self_attn.out_proj", "feed_forward.w2"),
        couplings=LFM2_COUPLINGS,
    )
)
