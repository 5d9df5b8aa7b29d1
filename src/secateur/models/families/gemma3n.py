"""Gemma 3n: four hidden states for each token (AltUp), per-layer embeddings, shared keys."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings

OF_EACH_LAYER = {
    "model.embed_tokens_per_layer": ("-", "layers"),
    "model.per_layer_model_projection": ("layers", "-"),
}
"""Per-layer embeddings: a table and a projection, with columns and rows for each layer."""

PER_LAYER_INPUT = {
    "per_layer_input_gate": ("-", "-"),
    "per_layer_projection": ("-", "-"),
    "post_per_layer_input_norm": ("-",),
}
"""How a layer reads its embeddings."""

UNCUT_ATTENTION = {
    "self_attn.q_proj": ("-", "-"),
    "self_attn.k_proj": ("-", "-"),
    "self_attn.v_proj": ("-", "-"),
    "self_attn.o_proj": ("-", "-"),
    "self_attn.q_norm": ("-",),
    "self_attn.k_norm": ("-",),
}
"""Attention whose heads are not cut."""

FFN_OF_A_FIXED_STREAM = {
    "mlp.gate_proj": ("neurons", "-"),
    "mlp.up_proj": ("neurons", "-"),
    "mlp.down_proj": ("-", "neurons"),
    "input_layernorm": ("-",),
    "post_attention_layernorm": ("-",),
    "pre_feedforward_layernorm": ("-",),
    "post_feedforward_layernorm": ("-",),
}
"""A gated feed-forward and four norms, where channels of the residual stream are not cut."""

LATE_LAYERS_READ = "late layers read keys and values of earlier ones, with the same heads"

GEMMA3N = families.register("gemma3n")(
    Family(
        model_types=("gemma3n_text",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=Couplings(
            layer={
                **UNCUT_ATTENTION,
                **FFN_OF_A_FIXED_STREAM,
                **PER_LAYER_INPUT,
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
    )
)
