"""Decoders of other layouts: queries, keys and values in one matrix, or like no other family."""

from secateur.models import architecture
from secateur.models.expert_layout import Experts
from secateur.models.families import ends, ffn, grouped, llama_like, over

WIDE_FFN: architecture.Axes = ffn("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
UNCUT_ATTENTION: architecture.Axes = {
    **over("- hidden", "self_attention.query_key_value"),
    **over("hidden -", "self_attention.dense"),
}
QKV = " ".join(llama_like.QUERIES_KEYS_VALUES)
AS_MANY_HEADS = "its heads are as many as the hidden size has room for"

NEOX = architecture.Family(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    groups=grouped("attention.query_key_value", "attention.dense", *WIDE_FFN),
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    couplings=llama_like.PRE_NORM.plus(
        {
            **over("triples hidden", "attention.query_key_value"),
            **over("hidden queries", "attention.dense"),
            **WIDE_FFN,
        },
        outside=ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        attention="attention",
    ),
)
FALCON = architecture.Family(
    model_types=("falcon",),
    layers="transformer.h",
    groups=grouped(*UNCUT_ATTENTION, *WIDE_FFN),
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    couplings=architecture.Couplings(
        layer={
            **llama_like.TWO_NORMS,  # or one, or two with other names: the configuration says it
            **over("hidden", "ln_attn ln_mlp"),
            **UNCUT_ATTENTION,
            **WIDE_FFN,
        },
        outside=ends("transformer.word_embeddings", "transformer.ln_f"),
        attention="self_attention",
        neurons_key="ffn_hidden_size",
        fixed={
            "groups": "queries, keys and values lie in one matrix, in an order that each "
            "configuration chooses",
            "hidden": AS_MANY_HEADS,
        },
    ),
)

OF_EACH_LAYER: architecture.Axes = {
    **over("- layers", "model.embed_tokens_per_layer"),
    **over("layers -", "model.per_layer_model_projection"),
}
"""Per-layer embeddings: a table and a projection, with columns and rows for each layer."""
FIXED_STREAM: architecture.Axes = {
    **over("- -", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),
    **llama_like.HEAD_NORMS,
    **over("neurons -", "mlp.gate_proj mlp.up_proj"),
    **over("- neurons", "mlp.down_proj"),
    **over("-", "input_layernorm post_attention_layernorm"),
    **over("-", "pre_feedforward_layernorm post_feedforward_layernorm"),
    **over("- -", "per_layer_input_gate per_layer_projection"),
    **over("-", "post_per_layer_input_norm"),
}
"""A layer whose heads and channels of the residual stream are not cut, with its own embeddings."""
LATE_LAYERS_READ = "late layers read keys and values of earlier ones, with the same heads"
GEMMA4_EXPERTS = Experts(module="experts", router="router.proj", chosen="top_k_experts")

TABLE = {
    # Conv1D modules, which store the transpose [in, out].
    "gpt2": architecture.Family(
        model_types=("gpt2",),
        layers="transformer.h",
        groups=grouped("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        writers=("attn.c_proj", "mlp.c_proj"),
        couplings=architecture.Couplings(
            layer={
                **over("hidden", "ln_1 ln_2"),
                **over("queries+keys+keys hidden", "attn.c_attn"),
                **over("hidden queries", "attn.c_proj"),
                **ffn("mlp.c_fc", "mlp.c_proj"),
            },
            outside=ends("transformer.wte transformer.wpe", "transformer.ln_f"),
            attention="attn",
            attention_norms=("ln_1",),
            ffn_norms=("ln_2",),
            neurons_key="n_inner",
            attributes={"attn": {"num_heads": "heads", "split_size": "queries"}},
        ),
    ),
    # GPT-NeoX and Pythia: attention and feed-forward side by side.
    "gpt_neox": NEOX,
    # Attention and feed-forward side by side.
    "falcon": FALCON,
    # Queries, keys and values of each head together; positions by ALiBi.
    "bloom": FALCON.like(
        "bloom",
        couplings=llama_like.PRE_NORM.plus(
            {**UNCUT_ATTENTION, **WIDE_FFN},
            outside=ends(
                "transformer.word_embeddings",
                "transformer.word_embeddings_layernorm transformer.ln_f",
            ),
            attention="self_attention",
            neurons_key="",
            fixed={
                "groups": "ALiBi gives every head a slope by its number",
                "hidden": AS_MANY_HEADS,
            },
        ),
    ),
    # Phi-3 and Phi-4: gate and up in one matrix too.
    "phi3": architecture.Family(
        model_types=("phi3",),
        groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), *llama_like.FUSED_FFN_GROUPS),
        writers=architecture.PRE_NORM_WRITERS,
        couplings=llama_like.PRE_NORM.plus(
            {
                **over("queries+keys+keys hidden", "self_attn.qkv_proj"),
                **over("hidden queries", "self_attn.o_proj"),
                **llama_like.FUSED_GATED_FFN,
            },
            attributes={
                "self_attn": {
                    "num_key_value_heads": "groups",
                    "config.num_attention_heads": "heads",
                }
            },
        ),
    ),
    # Separate projections with biases, plain feed-forward with ReLU.
    "opt": architecture.Family(
        model_types=("opt",),
        layers="model.decoder.layers",
        groups=grouped(QKV, "self_attn.out_proj", "fc1", "fc2"),
        couplings=architecture.Couplings(
            layer={
                **llama_like.QUERIES_KEYS_VALUES,
                **over("hidden queries", "self_attn.out_proj"),
                **ffn("fc1", "fc2"),
                **over("hidden", "self_attn_layer_norm final_layer_norm"),
            },
            # Without project_in the embedding is as wide as the residual stream.
            outside={
                **over("- embedding", "model.decoder.embed_tokens lm_head"),
                **over("- hidden", "model.decoder.embed_positions model.decoder.project_out"),
                **over("hidden -", "model.decoder.project_in"),
                **over("hidden", "model.decoder.final_layer_norm"),
            },
            ffn=("fc1", "fc2"),
            neurons_key="ffn_dim",
            attributes={"self_attn": {"num_heads": "heads"}},
        ),
    ),
    # Phi-1 and Phi-2: one norm, then attention and feed-forward side by side.
    "phi": architecture.Family(
        model_types=("phi",),
        groups=grouped(QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
        writers=("self_attn.dense", "mlp.fc2"),
        couplings=architecture.Couplings(
            layer={
                **llama_like.QUERIES_KEYS_VALUES,
                **over("hidden queries", "self_attn.dense"),
                **ffn("mlp.fc1", "mlp.fc2"),
                **over("hidden", "input_layernorm"),
            },
            outside=ends("model.embed_tokens", "model.final_layernorm"),
        ),
    ),
    # One norm, then attention and feed-forward side by side.
    "gptj": architecture.Family(
        model_types=("gptj",),
        layers="transformer.h",
        groups=grouped(
            "attn.q_proj attn.k_proj attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"
        ),
        writers=("attn.out_proj", "mlp.fc_out"),
        couplings=architecture.Couplings(
            layer={
                **over("hidden", "ln_1"),
                **over("queries hidden", "attn.q_proj"),
                **over("keys hidden", "attn.k_proj attn.v_proj"),
                **over("hidden queries", "attn.out_proj"),
                **ffn("mlp.fc_in", "mlp.fc_out"),
            },
            outside=ends("transformer.wte", "transformer.ln_f"),
            attention="attn",
            neurons_key="n_inner",
            attributes={"attn": {"num_attention_heads": "heads", "embed_dim": "queries"}},
        ),
    ),
    # Four hidden states for each token (AltUp), per-layer embeddings, shared keys.
    "gemma3n": architecture.Family(
        model_types=("gemma3n_text",),
        couplings=architecture.Couplings(
            layer={
                **FIXED_STREAM,
                **over("- -", "altup.correction_coefs altup.prediction_coefs"),
                **over("- -", "altup.modality_router laurel.linear_left laurel.linear_right"),
                **over("-", "altup.correct_output_scale altup.router_norm laurel.post_laurel_norm"),
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
    "gemma4": architecture.Family(
        model_types=("gemma4_text",),
        couplings=architecture.Couplings(
            layer={
                **FIXED_STREAM,
                **GEMMA4_EXPERTS.axes(stream="-"),
                "router.scale": ("-",),
                "router.per_expert_scale": ("experts",),
                **over("-", "post_feedforward_layernorm_1 post_feedforward_layernorm_2"),
                **over("-", "pre_feedforward_layernorm_2 layer_scalar"),
            },
            outside=OF_EACH_LAYER,
            attributes={"experts": {"num_experts": "experts"}},
            fixed={
                "groups": f"global layers have heads of another size, and {LATE_LAYERS_READ}",
                "hidden": "its router and per-layer embeddings scale with the hidden size",
            },
        ),
        experts=GEMMA4_EXPERTS,
    ),
}

for name, family in TABLE.items():
    architecture.families.register(name)(family)
