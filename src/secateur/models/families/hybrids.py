"""Hybrids: state spaces, convolutions or linear attention in most layers, attention in others."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    SPLIT_ATTENTION_GROUPS,
    Axes,
    Couplings,
    Family,
    families,
)
from secateur.models.expert_layout import ExpertLayout, Experts
from secateur.models.families.llama_like import (
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    HEAD_NORMS,
    PRE_NORM,
    SPLIT_ATTENTION,
    TWO_NORMS,
)
from secateur.models.families.mixtures import GATED_SHARED_EXPERT, GRANITE, W132


def _mamba_axes(module: str) -> Axes:
    """Mamba-2, whose states are left as they are."""
    of_state = dict.fromkeys(("norm", "A_log", "D", "dt_bias"), ("state",))
    axes: Axes = {
        "in_proj": ("state", "hidden"),
        "out_proj": ("hidden", "state"),
        "conv1d": ("state", "state", "state"),
        **of_state,
    }
    return {f"{module}.{name}": own for name, own in axes.items()}


MAMBA_GROUPS = (("mamba.in_proj",), ("mamba.out_proj",))
TIED_STATES = "the states of its Mamba layers are a multiple of the hidden size"

BAMBA_COUPLINGS = Couplings(
    layer={
        **_mamba_axes("mamba"),
        **SPLIT_ATTENTION,
        "input_layernorm": ("hidden",),
        "feed_forward.gate_proj": ("neurons", "hidden"),
        "feed_forward.up_proj": ("neurons", "hidden"),
        "feed_forward.down_proj": ("hidden", "neurons"),
        "pre_ff_layernorm": ("hidden",),
    },
    outside={
        "model.embed_tokens": ("-", "hidden"),
        "model.final_layernorm": ("hidden",),
        "lm_head": ("-", "hidden"),
    },
    ffn=("feed_forward",),
    ffn_norms=("pre_ff_layernorm",),
    fixed={"hidden": TIED_STATES},
)
BAMBA = Family(
    model_types=("bamba",),
    layers="model.layers",
    groups=(
        *MAMBA_GROUPS,
        *SPLIT_ATTENTION_GROUPS,
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
        ("feed_forward.down_proj",),
    ),
    writers=("mamba.out_proj", "self_attn.o_proj", "feed_forward.down_proj"),
    couplings=BAMBA_COUPLINGS,
)

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

DELTANET_COUPLINGS = PRE_NORM.plus(
    {
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
        **HEAD_NORMS,
        **GATED_FFN,
    },
    norm_offset=1.0,
)
"""Gated DeltaNet, and attention with a gate for every query."""

LFM2_EXPERTS = Experts(module="feed_forward.experts", router="feed_forward.gate", stored=W132)
NEMOTRON_EXPERTS = Experts(
    module="mixer.experts",
    router="mixer.gate",
    count="n_routed_experts",
    layout=ExpertLayout(gated=False),
)

TABLE = {
    # Mamba-2 in most layers, attention in the others, a feed-forward in all.
    "bamba": BAMBA,
    # Mamba-2 and attention side by side in every layer; factors come between writers and stream.
    "falcon_h1": BAMBA.like(
        "falcon_h1",
        writers=(),
        couplings=BAMBA_COUPLINGS.plus(
            {},
            alike="transformers does not compute its factors for a class that is not its own",
        ),
    ),
    # Granite 4: Mamba-2 in most layers, attention in the others; some sizes have experts.
    "granite_hybrid": Family(
        model_types=("granitemoehybrid",),
        layers="model.layers",
        groups=(
            *MAMBA_GROUPS,
            *SPLIT_ATTENTION_GROUPS,
            ("shared_mlp.input_linear",),
            ("shared_mlp.output_linear",),
        ),
        couplings=Couplings(
            layer={
                **_mamba_axes("mamba"),
                **SPLIT_ATTENTION,
                **TWO_NORMS,
                "shared_mlp.input_linear": ("neurons+neurons", "hidden"),
                "shared_mlp.output_linear": ("hidden", "neurons"),
                **GRANITE.axes(),
            },
            outside=EMBEDDING_AND_HEAD,
            ffn=("shared_mlp", "block_sparse_moe"),
            ffn_norms=("post_attention_layernorm",),
            neurons_key="shared_intermediate_size",
            attributes=GRANITE.sizes(),
            fixed={"hidden": TIED_STATES},
        ),
        experts=GRANITE,
    ),
    # Short convolutions in most layers, attention in the others.
    "lfm2": Family(
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
    ),
    # The same with experts, and a router with a correction.
    "lfm2_moe": Family(
        model_types=("lfm2_moe",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=LFM2_COUPLINGS.plus(
            {**LFM2_EXPERTS.axes(), "feed_forward.expert_bias": ("experts",)},
            with_neurons={},
            attributes=LFM2_EXPERTS.sizes(),
        ),
        experts=LFM2_EXPERTS,
    ),
    # Mamba, attention and experts without a gate, which may read a latent space.
    "nemotron_h": Family(
        model_types=("nemotron_h",),
        layers="model.layers",
        groups=(
            ("mixer.in_proj",),
            ("mixer.out_proj",),
            ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
            ("mixer.o_proj",),
            ("mixer.up_proj",),
            ("mixer.down_proj",),
        ),
        writers=("mixer.out_proj", "mixer.o_proj", "mixer.down_proj"),
        couplings=Couplings(
            layer={
                **_mamba_axes("mixer"),
                "mixer.q_proj": ("state", "hidden"),
                "mixer.k_proj": ("state", "hidden"),
                "mixer.v_proj": ("state", "hidden"),
                "mixer.o_proj": ("hidden", "state"),
                "mixer.up_proj": ("neurons", "hidden"),
                "mixer.down_proj": ("hidden", "neurons"),
                "norm": ("hidden",),
                **NEMOTRON_EXPERTS.axes(stream="-"),
            },
            outside={
                "model.embeddings": ("-", "hidden"),
                "model.norm_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="",  # no layer has it besides something else
            ffn=("mixer",),
            ffn_norms=("norm",),
            attributes=NEMOTRON_EXPERTS.sizes(),
            fixed={
                "groups": "a layer with attention has nothing else, so the layer can be removed",
                "hidden": TIED_STATES,
            },
        ),
        experts=NEMOTRON_EXPERTS,
    ),
    # Qwen3.5 (dense): three layers of gated DeltaNet to one of gated attention.
    "qwen3_5": Family(
        model_types=("qwen3_5_text",),
        layers="model.layers",
        groups=(
            tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
            ("linear_attn.out_proj",),
            *SPLIT_ATTENTION_GATED_FFN,
        ),
        writers=("linear_attn.out_proj", *PRE_NORM_WRITERS),
        couplings=DELTANET_COUPLINGS,
    ),
    # Qwen3-Next and Qwen3.5-MoE: the same with many experts and a shared one.
    "qwen3_next": Family(
        model_types=("qwen3_next", "qwen3_5_moe_text"),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=DELTANET_COUPLINGS.plus(
            {
                "linear_attn.in_proj_qkvz": ("state", "hidden"),
                "linear_attn.in_proj_ba": ("state", "hidden"),
                **Experts().axes(),
                **GATED_SHARED_EXPERT,
            },
            attributes=Experts().sizes("hidden_dim"),
        ),
        experts=Experts(),
    ),
}

for name, family in TABLE.items():
    families.register(name)(family)
