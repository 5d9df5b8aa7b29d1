"""Phi-1 and Phi-2: one norm, then attention and feed-forward side by side."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import SPLIT_ATTENTION, Couplings

PHI = families.register("phi")(
    Family(
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
                **{n: SPLIT_ATTENTION[n] for n in SPLIT_ATTENTION if "o_proj" not in n},
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
    )
)
