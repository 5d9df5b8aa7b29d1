"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in another."""

from secateur.models.architecture import PRE_NORM_WRITERS, Family, families

PHI3 = families.register("phi3")(
    Family(
        model_types=("phi3",),
        layers="model.layers",
        groups=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        writers=PRE_NORM_WRITERS,
    )
)
