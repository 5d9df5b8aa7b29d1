"""GPT-2: Conv1D modules, which store the transpose [in, out]."""

from secateur.models.architecture import Family, families

GPT2 = families.register("gpt2")(
    Family(
        model_types=("gpt2",),
        layers="transformer.h",
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        writers=("attn.c_proj", "mlp.c_proj"),
    )
)
