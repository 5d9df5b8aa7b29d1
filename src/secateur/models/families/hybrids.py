"""Hybrids: state spaces, convolutions or linear attention in most layers, attention in others."""

from secateur.models import architecture
from secateur.models.expert_layout import ExpertLayout, Experts
from secateur.models.families import ends, ffn, grouped, llama_like, mixtures, over


def _mamba_axes(module: str) -> architecture.Axes:
    """Mamba-2, whose states are left as they are."""
    return {
        **over("state hidden", f"{module}.in_proj"),
        **over("hidden state", f"{module}.out_proj"),
        **over("state state state", f"{module}.conv1d"),
        **over("state", f"{module}.norm {module}.A_log {module}.D {module}.dt_bias"),
    }


MAMBA_GROUPS = grouped("mamba.in_proj", "mamba.out_proj")
TIED_STATES = "the states of its Mamba layers are a multiple of the hidden size"

BAMBA_COUPLINGS = architecture.Couplings(
    layer={
        **_mamba_axes("mamba"),
        **llama_like.SPLIT_ATTENTION,
        "input_layernorm": ("hidden",),
        **mixtures.FEED_FORWARD,
        "pre_ff_layernorm": ("hidden",),
    },
    outside=ends("model.embed_tokens", "model.final_layernorm"),
    ffn=("feed_forward",),
    ffn_norms=("pre_ff_layernorm",),
    fixed={"hidden": TIED_STATES},
)
BAMBA = architecture.Family(
    model_types=("bamba",),
    groups=(*MAMBA_GROUPS, *architecture.SPLIT_ATTENTION_GROUPS, *mixtures.FEED_FORWARD_GROUPS),
    writers=("mamba.out_proj", "self_attn.o_proj", "feed_forward.down_proj"),
    couplings=BAMBA_COUPLINGS,
)

LFM2_WRITERS = ("conv.out_proj", "self_attn.out_proj", "feed_forward.w2")
LFM2_COUPLINGS = architecture.Couplings(
    layer={
        **over("state hidden", "conv.in_proj"),
        **over("state state state", "conv.conv"),
        **over("hidden state", "conv.out_proj"),
        **llama_like.QUERIES_KEYS_VALUES,
        **over("hidden queries", "self_attn.out_proj"),
        **over("-", "self_attn.q_layernorm self_attn.k_layernorm"),
        **over("hidden", "operator_norm"),
        **ffn("feed_forward.w1 feed_forward.w3", "feed_forward.w2"),
        **over("hidden", "ffn_norm"),
    },
    outside=ends("model.embed_tokens", "model.embedding_norm"),
    ffn=("feed_forward",),
    ffn_norms=("ffn_norm",),
    with_neurons={"block_auto_adjust_ff_dim": False},
    fixed={"hidden": "its convolutions run over the residual stream's channels"},
)

DELTANET_INPUTS = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
DELTANET_WRITERS = ("linear_attn.out_proj", *architecture.PRE_NORM_WRITERS)
DELTANET_COUPLINGS = llama_like.PRE_NORM.plus(
    {
        **over("state hidden", " ".join(DELTANET_INPUTS)),
        **over("hidden state", "linear_attn.out_proj"),
        **over("state state state", "linear_attn.conv1d"),
        **over("state", "linear_attn.norm linear_attn.A_log linear_attn.dt_bias"),
        **llama_like.SPLIT_ATTENTION,
        **over("pairs hidden", "self_attn.q_proj"),
        **llama_like.HEAD_NORMS,
        **llama_like.GATED_FFN,
    },
    norm_offset=1.0,
)
"""Gated DeltaNet, and attention with a gate for every query."""

LFM2_EXPERTS = Experts(
    module="feed_forward.experts", router="feed_forward.gate", stored=mixtures.W132
)
NEMOTRON_EXPERTS = Experts(
    module="mixer.experts",
    router="mixer.gate",
    count="n_routed_experts",
    shared_width="moe_shared_expert_intermediate_size",
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
            {}, alike="transformers does not compute its factors for a class that is not its own"
        ),
    ),
    # Granite 4: Mamba-2 in most layers, attention in the others; some sizes have experts.
    "granite_hybrid": architecture.Family(
        model_types=("granitemoehybrid",),
        groups=(
            *MAMBA_GROUPS,
            *architecture.SPLIT_ATTENTION_GROUPS,
            *grouped("shared_mlp.input_linear", "shared_mlp.output_linear"),
        ),
        couplings=architecture.Couplings(
            layer={
                **_mamba_axes("mamba"),
                **llama_like.SPLIT_ATTENTION,
                **llama_like.TWO_NORMS,
                "shared_mlp.input_linear": ("neurons+neurons", "hidden"),
                "shared_mlp.output_linear": ("hidden", "neurons"),
                **mixtures.GRANITE.axes(),
            },
            outside=llama_like.EMBEDDING_AND_HEAD,
            ffn=("shared_mlp", "block_sparse_moe"),
            ffn_norms=("post_attention_layernorm",),
            neurons_key="shared_intermediate_size",
            attributes=mixtures.GRANITE.sizes(),
            fixed={"hidden": TIED_STATES},
        ),
        experts=mixtures.GRANITE,
    ),
    # Short convolutions in most layers, attention in the others.
    "lfm2": architecture.Family(
        model_types=("lfm2",),
        groups=grouped(
            "conv.in_proj",
            "conv.out_proj",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "self_attn.out_proj",
            "feed_forward.w1 feed_forward.w3",
            "feed_forward.w2",
        ),
        writers=LFM2_WRITERS,
        couplings=LFM2_COUPLINGS,
    ),
    # The same with experts, and a router with a correction.
    "lfm2_moe": architecture.Family(
        model_types=("lfm2_moe",),
        couplings=LFM2_COUPLINGS.plus(
            {**LFM2_EXPERTS.axes(), "feed_forward.expert_bias": ("experts",)},
            with_neurons={},
            attributes=LFM2_EXPERTS.sizes(),
        ),
        writers=LFM2_WRITERS,
        experts=LFM2_EXPERTS,
    ),
    # Mamba, attention and experts without a gate, which may read a latent space.
    "nemotron_h": architecture.Family(
        model_types=("nemotron_h",),
        groups=grouped(
            "mixer.in_proj",
            "mixer.out_proj",
            "mixer.q_proj mixer.k_proj mixer.v_proj",
            "mixer.o_proj",
            "mixer.up_proj",
            "mixer.down_proj",
        ),
        writers=("mixer.out_proj", "mixer.o_proj", "mixer.down_proj"),
        couplings=architecture.Couplings(
            layer={
                **_mamba_axes("mixer"),
                **over("state hidden", "mixer.q_proj mixer.k_proj mixer.v_proj"),
                **over("hidden state", "mixer.o_proj"),
                **ffn("mixer.up_proj", "mixer.down_proj"),
                **over("hidden", "norm"),
                **NEMOTRON_EXPERTS.axes(stream="-"),
                **over("shared_neurons hidden", "mixer.shared_experts.up_proj"),
                **over("hidden shared_neurons", "mixer.shared_experts.down_proj"),
            },
            outside=ends("model.embeddings", "model.norm_f"),
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
    "qwen3_5": architecture.Family(
        model_types=("qwen3_5_text",),
        groups=(
            DELTANET_INPUTS,
            ("linear_attn.out_proj",),
            *architecture.SPLIT_ATTENTION_GATED_FFN,
        ),
        writers=DELTANET_WRITERS,
        couplings=DELTANET_COUPLINGS,
    ),
    # Qwen3-Next and Qwen3.5-MoE: the same with many experts and a shared one.
    "qwen3_next": architecture.Family(
        model_types=("qwen3_next", "qwen3_5_moe_text"),
        couplings=DELTANET_COUPLINGS.plus(
            {
                **over("state hidden", "linear_attn.in_proj_qkvz linear_attn.in_proj_ba"),
                **mixtures.SHARED.axes(),
                **mixtures.GATED_SHARED_EXPERT,
            },
            attributes=mixtures.SHARED.sizes("hidden_dim"),
        ),
        writers=DELTANET_WRITERS,
        experts=mixtures.SHARED,
    ),
}

for name, family in TABLE.items():
    architecture.families.register(name)(family)
