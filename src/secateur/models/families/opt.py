"""OPT: separate projections with biases, plain feed-forward with ReLU."""

from secateur.models.architecture import Family, families

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
    )
)
