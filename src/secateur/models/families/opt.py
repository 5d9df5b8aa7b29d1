"""OPT: separate projections with biases, plain feed-forward with ReLU."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import SPLIT_ATTENTION, Couplings

OPT = families.register("opt")(
    Family(
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
                **{n: SPLIT_ATTENTION[n] for n in SPLIT_ATTENTION if "o_proj" not in n},
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
    )
)
