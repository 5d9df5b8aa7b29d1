"""GPT-NeoX and Pythia: fused queries, keys and values; attention and feed-forward side by side."""

from secateur.models.architecture import Family, families

GPT_NEOX = families.register("gpt_neox")(
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        groups=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        writers=("attention.dense", "mlp.dense_4h_to_h"),
    )
)
