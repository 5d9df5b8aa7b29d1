"""Mixtures of experts with attention in every layer."""

from dataclasses import replace
from typing import Any

from secateur.models import architecture
from secateur.models.expert_layout import ExpertLayout, Experts
from secateur.models.families import ffn, grouped, llama_like, over


def _expert(name: str) -> tuple[architecture.Groups, architecture.Axes]:
    """The groups and axes of an expert for every token, which has a gate."""
    inputs, down = f"{name}.gate_proj {name}.up_proj", f"{name}.down_proj"
    return grouped(inputs, down), {
        **over("shared_neurons hidden", inputs),
        **over("hidden shared_neurons", down),
    }


SHARED_EXPERT_GROUPS, SHARED_EXPERT = _expert("mlp.shared_expert")
SHARED_EXPERTS_GROUPS, SHARED_EXPERTS = _expert("mlp.shared_experts")
SHARED_MLP_GROUPS, SHARED_MLP = _expert("mlp.shared_mlp")
LLAMA4_SHARED_GROUPS, LLAMA4_SHARED = _expert("feed_forward.shared_expert")
_GATE_AND_UP, _DOWN = "feed_forward.gate_proj feed_forward.up_proj", "feed_forward.down_proj"
FEED_FORWARD_GROUPS, FEED_FORWARD = grouped(_GATE_AND_UP, _DOWN), ffn(_GATE_AND_UP, _DOWN)
NARROW_SHARED_EXPERTS = {
    **over("shared_neurons+shared_neurons -", "mlp.shared_experts.gate_up_proj"),
    **over("shared_neurons -", "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"),
    **over("- shared_neurons", "mlp.shared_experts.down_proj"),
}
"""Of a stream that is not cut; gate and up may lie in one tensor."""
GATED_SHARED_EXPERT = {**SHARED_EXPERT, "mlp.shared_expert_gate": ("-", "hidden")}

LATENT_ATTENTION: architecture.Axes = {
    **over("parts hidden", "self_attn.q_proj"),
    **over("- hidden", "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa"),
    **over("-", "self_attn.q_a_layernorm self_attn.kv_a_layernorm"),
    **over("parts -", "self_attn.q_b_proj self_attn.kv_b_proj"),
    **over("hidden queries", "self_attn.o_proj"),
}
"""Queries, keys and values of all heads come from short vectors, which stay whole."""

W132 = ("w1", "w3", "w2")
LOCAL = Experts(count="num_local_experts", width="intermediate_size")
WIDE = Experts(width="intermediate_size")
ROUTED = Experts(count="n_routed_experts")
SHARED = Experts(shared_width="shared_expert_intermediate_size")
STEP3 = Experts(count="n_routed_experts", stacked="moe", shared_width="share_expert_dim")
GRANITE = replace(LOCAL, module="block_sparse_moe.experts", router="block_sparse_moe.router")
MINIMAX_M3 = replace(LOCAL, shared_width="shared_intermediate_size")
LLAMA4 = replace(
    LOCAL,
    module="feed_forward.experts",
    router="feed_forward.router",
    layout=ExpertLayout(transposed=True),
    scaled_inputs=True,
)
GPT_OSS = replace(
    LOCAL,
    router="mlp.router",
    layout=ExpertLayout(transposed=True, interleaved=True, biased=True),
)


def _mixture(
    *model_types: str,
    experts: Experts = Experts(),  # noqa: B008 - frozen
    axes: architecture.Axes | None = None,
    router: tuple[str, ...] = (),
    base: architecture.Couplings = llama_like.LLAMA_COUPLINGS,
    groups: architecture.Groups = architecture.SPLIT_ATTENTION_GROUPS,
    writers: tuple[str, ...] = ("self_attn.o_proj",),
    **changes: Any,
) -> architecture.Family:
    """A family with experts in the place of the feed-forward, in all layers or in most."""
    changes = {"attributes": experts.sizes(*router), **changes}
    couplings = base.plus({**experts.axes(), **(axes or {})}, **changes)
    return architecture.Family(model_types, "model.layers", groups, writers, experts, couplings)


def _experts_alone(
    *model_types: str, experts: Experts = ROUTED, axes: architecture.Axes | None = None
) -> architecture.Family:
    """A family with shared experts, of which layers, experts and their neurons are cut."""
    axes = {**experts.axes(stream="-"), **NARROW_SHARED_EXPERTS, **(axes or {})}
    couplings = architecture.Couplings(axes, outside={}, attributes=experts.sizes())
    return architecture.Family(model_types, couplings=couplings, experts=experts)


WIDTH = ("hidden_dim",)
"""The attribute of most routers that holds the hidden size."""

TABLE = {
    # Mistral's attention, and experts of which each token is sent to two.
    "mixtral": _mixture("mixtral", experts=replace(LOCAL, stored=W132), router=WIDTH),
    # Phi-3.5-MoE: LayerNorms with biases, and a router that picks two experts in turn.
    "phimoe": _mixture("phimoe", experts=replace(LOCAL, router="mlp.router", stored=W132)),
    # Queries and keys are normalised over all heads; no shared expert.
    "olmoe": _mixture("olmoe", experts=WIDE, axes=llama_like.WIDE_NORMS, router=WIDTH),
    # A router with a correction; queries and keys normalised over all heads.
    "minimax_m2": _mixture(
        "minimax_m2",
        experts=replace(LOCAL, stored=W132),
        axes={**llama_like.WIDE_NORMS, "mlp.e_score_correction_bias": ("experts",)},
        router=WIDTH,
    ),
    # Attention sinks; transposed experts with biases, gate and up interleaved and clamped.
    "gpt_oss": _mixture("gpt_oss", experts=GPT_OSS, axes=llama_like.SINKS, router=WIDTH),
    # Multipliers in attention; experts stored in one tensor.
    "granitemoe": _mixture("granitemoe", experts=GRANITE, writers=(), ffn=("block_sparse_moe",)),
    # Qwen1.5-MoE and Qwen2-MoE: many small experts, and a shared one. Layers may be dense.
    "qwen2_moe": _mixture(
        "qwen2_moe",
        experts=SHARED,
        axes=GATED_SHARED_EXPERT,
        router=WIDTH,
        groups=(*architecture.SPLIT_ATTENTION_GATED_FFN, *SHARED_EXPERT_GROUPS),
        writers=architecture.PRE_NORM_WRITERS,
    ),
    # Many small experts, none shared; normalised queries and keys. Layers may be dense.
    "qwen3_moe": _mixture(
        "qwen3_moe",
        axes=llama_like.HEAD_NORMS,
        router=WIDTH,
        groups=architecture.SPLIT_ATTENTION_GATED_FFN,
        writers=architecture.PRE_NORM_WRITERS,
    ),
    # GLM-4.5 and later, dots.1: a router with a correction, dense first layers.
    "glm4_moe": _mixture(
        "glm4_moe",
        "dots1",
        experts=ROUTED,
        axes={**llama_like.HEAD_NORMS, **SHARED_EXPERTS},
        router=WIDTH,
        groups=(*architecture.SPLIT_ATTENTION_GATED_FFN, *SHARED_EXPERTS_GROUPS),
        writers=architecture.PRE_NORM_WRITERS,
    ),
    # A router with a correction, shared experts, dense first layers.
    "ernie4_5_moe": _mixture(
        "ernie4_5_moe",
        experts=Experts(count="moe_num_experts"),
        axes={**SHARED_EXPERTS, "mlp.gate.moe_statics.e_score_correction_bias": ("-", "experts")},
        groups=(*architecture.SPLIT_ATTENTION_GATED_FFN, *SHARED_EXPERTS_GROUPS),
        writers=architecture.PRE_NORM_WRITERS,
    ),
    # A shared expert in every layer; queries and keys normalised after rotation.
    "hunyuan_v1_moe": _mixture(
        "hunyuan_v1_moe",
        experts=replace(WIDE, router="mlp.gate.wg"),
        axes={**llama_like.HUNYUAN_NORMS, **SHARED_MLP},
        groups=(*architecture.SPLIT_ATTENTION_GROUPS, *SHARED_MLP_GROUPS),
        attributes={key: {"num_experts": "experts"} for key in ("mlp.gate", "mlp.experts")},
    ),
    # The text model: transposed experts whose inputs are scaled, a shared expert, dense layers.
    "llama4": _mixture(
        "llama4_text",
        experts=LLAMA4,
        base=llama_like.SPLIT,
        axes={**FEED_FORWARD, **LLAMA4_SHARED},
        groups=(*architecture.SPLIT_ATTENTION_GROUPS, *FEED_FORWARD_GROUPS, *LLAMA4_SHARED_GROUPS),
        writers=("self_attn.o_proj", "feed_forward.down_proj"),
        ffn=("feed_forward",),
        neurons_key="intermediate_size_mlp",
    ),
    # DeepSeek V2 and V3, GLM-4.7-Flash: latent attention, experts in groups, shared ones.
    "deepseek": _mixture(
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe_lite",
        experts=ROUTED,
        base=llama_like.PRE_NORM.plus({**LATENT_ATTENTION, **llama_like.GATED_FFN}),
        axes=SHARED_EXPERTS,
        groups=(),
        writers=architecture.PRE_NORM_WRITERS,
        attributes={"self_attn": {"num_heads": "heads"}, **ROUTED.sizes()},
    ),
    # A gate for each query head; clamped experts, stored by projection.
    "step3p7": _mixture(
        "step3p5",
        experts=STEP3,
        axes={**llama_like.HEAD_NORMS, "self_attn.g_proj": ("heads", "hidden"), **SHARED_EXPERTS},
        groups=(),
        writers=(),
        attributes={"self_attn": {"num_heads": "heads"}, **STEP3.sizes(*WIDTH)},
    ),
    # The text model: experts with a clamped gate and a shared one, sparse attention.
    "minimax_m3": _experts_alone("minimax_m3_vl_text", experts=MINIMAX_M3),
    # GLM-5 and DeepSeek V3.2: latent attention to tokens that an indexer chooses.
    "glm_moe_dsa": _experts_alone("glm_moe_dsa", "deepseek_v32"),
    # Hy3: a router with a correction beside it.
    "hy_v3": _experts_alone(
        "hy_v3", experts=Experts(), axes={"mlp.e_score_correction_bias": ("experts",)}
    ),
    # Several hidden states for a token; in the first layers a table of tokens names the experts.
    "deepseek_v4": _experts_alone(
        "deepseek_v4",
        experts=Experts(stored=W132, count="n_routed_experts"),
        axes={"mlp.gate.tid2eid": ("-", "routes")},
    ),
}

for name, family in TABLE.items():
    architecture.families.register(name)(family)
