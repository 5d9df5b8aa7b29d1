"""GPT-2: Conv1D modules, which store the transpose [in, out]."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings

GPT2 = families.register("gpt2")(
    Family(
        model_types=("gpt2",),
        layers="transformer.h",
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        writers=("attn.c_proj", "mlp.c_proj"),
        couplings=Couplings(
            layer={
                "ln_1": ("hidden",),
                "attn.c_attn": ("queries+keys+keys", "hidden"),
                "attn.c_proj": ("hidden", "queries"),
                "ln_2": ("hidden",),
                "mlp.c_fc": ("neurons", "hidden"),
                "mlp.c_proj": ("hidden", "neurons"),
            },
            outside={
                "transformer.wte": ("-", "hidden"),
                "transformer.wpe": ("-", "hidden"),
                "transformer.ln_f": ("hidden",),
                "lm_head": ("-", "hidden"),
            },
            attention="attn",
            attention_norms=("ln_1",),
            ffn_norms=("ln_2",),
            neurons_key="n_inner",
            attributes={"attn": {"num_heads": "heads", "split_size": "queries"}},
        ),
    )
)
