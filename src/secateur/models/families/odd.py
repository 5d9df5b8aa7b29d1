"""Decoders whose layout no other family has: OPT, Phi-2, GPT-J, Gemma 3n and Gemma 4."""

from secateur.models.architecture import Axes, Couplings, Family, families
from secateur.models.expert_layout import Experts
from secateur.models.families.llama_like import HEAD_NORMS, SPLIT_ATTENTION

QUERIES_KEYS_VALUES = {n: axes for n, axes in SPLIT_ATTENTION.items() if "o_proj" not in n}

OF_EACH_LAYER: Axes = {
    "model.embed_tokens_per_layer": ("-", "layers"),
    "model.per_layer_model_projection": ("layers", "-"),
}
"""Per-layer embeddings: a table and a projection, with columns and rows for each layer."""
FIXED_STREAM: Axes = {
    "self_attn.q_proj": ("-", "-"),
    "self_attn.k_proj": ("-", "-"),
    "self_attn.v_proj": ("-", "-"),
    "self_attn.o_proj": ("-", "-"),
    **HEAD_NORMS,
    "mlp.gate_proj": ("neurons", "-"),
    "mlp.up_proj": ("neurons", "-"),
    "mlp.down_proj": ("-", "neurons"),
    "input_layernorm": ("-",),
    "post_attention_layernorm": ("-",),
    "pre_feedforward_layernorm": ("-",),
    "post_feedforward_layernorm": ("-",),
    "per_layer_input_gate": ("-", "-"),
    "per_layer_projection": ("-", "-"),
    "post_per_layer_input_norm": ("-",),
}
"""A layer whose heads and channels of the residual stream are not cut, with its own embeddings."""
LATE_LAYERS_READ = "late layers read keys and values of earlier ones, with the same heads"
GEMMA4_EXPERTS = Experts(module="experts", router="router.proj", chosen="top_k_experts")

TABLE = {
    # Separate projections with biases, plain feed-forward with ReLU.
    "opt": Family(
        model_types=("opt",),
        layers="model.decoder.layers",
        groups=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        couplings=Couplings(
            layer={
                **QUERIES_KEYS_VALUES,
                "self_attn.out_proj": ("hidden", "queries"),
                "self_attn_layer_norm": ("hidden",),
                "fc1": ("neurons", "hidden"),
                "fc2": ("hidden", "neurons"),
                "final_layer_norm": ("hidden",),
            },
            # Without project_in the embedding is as wide as the residual stream.
            outside={
                "model.decoder.embed_tokens": ("-", "embedding"),
                "model.decoder.embed_positions": ("-", "hidden"),
                "model.decoder.project_in": ("hidden", "-"),
                "model.decoder.project_out": ("-", "hidden"),
                "model.decoder.final_layer_norm": ("hidden",),
                "lm_head": ("-", "embedding"),
            },
            ffn=("fc1", "fc2"),
            neurons_key="ffn_dim",
            attributes={"self_attn": {"num_heads": "heads"}},
        ),
    ),
    # Phi-1 and Phi-2: one norm, then attention and feed-forward side by side.
    "phi": Family(
        model_types=("phi",),
        layers="model.layers",
        groups=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.dense",),
            ("mlp.fc1",),
            ("mlp.fc2",),
        ),
        writers=("self_attn.dense", "mlp.fc2"),
        couplings=Couplings(
            layer={
                **QUERIES_KEYS_VALUES,
                "self_attn.dense": ("hidden", "queries"),
                "mlp.fc1": ("neurons", "hidden"),
                "mlp.fc2": ("hidden", "neurons"),
                "input_layernorm": ("hidden",),
            },
            outside={
                "model.embed_tokens": ("-", "hidden"),
                "model.final_layernorm": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
        ),
    ),
    # One norm, then attention and feed-forward side by side.
    "gptj": Family(
        model_types=("gptj",),
        layers="transformer.h",
        groups=(
            ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            ("attn.out_proj",),
            ("mlp.fc_in",),
            ("mlp.fc_out",),
        ),
        writers=("attn.out_proj", "mlp.fc_out"),
        couplings=Couplings(
            layer={
                "ln_1": ("hidden",),
                "attn.q_proj": ("queries", "hidden"),
                "attn.k_proj": ("keys", "hidden"),
                "attn.v_proj": ("keys", "hidden"),
                "attn.out_proj": ("hidden", "queries"),
                "mlp.fc_in": ("neurons", "hidden"),
                "mlp.fc_out": ("hidden", "neurons"),
            },
            outside={
                "transformer.wte": ("-", "hidden"),
                "transformer.ln_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="attn",
            neurons_key="n_inner",
            attributes={"attn": {"num_attention_heads": "heads", "embed_dim": "queries"}},
        ),
    ),
    # Four hidden states for each token (AltUp), per-layer embeddings, shared keys.
    "gemma3n": Family(
        model_types=("gemma3n_text",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={
                **FIXED_STREAM,
                "altup.correct_output_scale": ("-",),
                "altup.correction_coefs": ("-", "-"),
                "altup.prediction_coefs": ("-", "-"),
                "altup.modality_router": ("-", "-"),
                "altup.router_norm": ("-",),
                "laurel.linear_left": ("-", "-"),
                "laurel.linear_right": ("-", "-"),
                "laurel.post_laurel_norm": ("-",),
            },
            outside=OF_EACH_LAYER,
            ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            fixed={
                "groups": LATE_LAYERS_READ,
                "hidden": "AltUp scales its hidden states to each other by their sizes",
            },
        ),
    ),
    # The text model: experts beside a dense feed-forward; per-layer embeddings in small models.
    "gemma4": Family(
        model_types=("gemma4_text",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={
                **FIXED_STREAM,
                **GEMMA4_EXPERTS.axes(stream="-"),
                "router.scale": ("-",),
                "router.per_expert_scale": ("experts",),
                "post_feedforward_layernorm_1": ("-",),
                "post_feedforward_layernorm_2": ("-",),
                "pre_feedforward_layernorm_2": ("-",),
                "layer_scalar": ("-",),
            },
            outside=OF_EACH_LAYER,
            attributes=GEMMA4_EXPERTS.sizes(),
            fixed={
                "groups": f"global layers have heads of another size, and {LATE_LAYERS_READ}",
                "hidden": "its router and per-layer embeddings scale with the hidden size",
            },
        ),
        experts=GEMMA4_EXPERTS,
    ),
}

for name, family in TABLE.items():
    families.register(name)(family)
