"""OLMo 2: Llama's linears, norms after each block instead of before."""

from secateur.models.architecture import SPLIT_ATTENTION_GATED_FFN, Family, families
from secateur.models.couplings import (
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    SPLIT_ATTENTION,
    Couplings,
)

OLMO2 = families.register("olmo2")(
    Family(
        model_types=("olmo2",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        couplings=Couplings(
            layer={
                **SPLIT_ATTENTION,
                **GATED_FFN,
                "self_attn.q_norm": ("queries",),
                "self_attn.k_norm": ("keys",),
                "post_attention_layernorm": ("hidden",),
                "post_feedforward_layernorm": ("hidden",),
            },
            outside=EMBEDDING_AND_HEAD,
            attention_norms=("post_attention_layernorm",),
            ffn_norms=("post_feedforward_layernorm",),
        ),
    )
)
