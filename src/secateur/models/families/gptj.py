"""GPT-J: one norm, then attention and feed-forward side by side."""

from secateur.models.architecture import Family, families
from secateur.models.couplings import Couplings

GPTJ = families.register("gptj")(
    Family(
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
    )
)
