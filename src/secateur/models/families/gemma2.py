"""Gemma 2: four norms per layer, soft-capped attention, alternating windows."""

from secateur.models.architecture import SPLIT_ATTENTION_GATED_FFN, Family, families
from secateur.models.couplings import (
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    SPLIT_ATTENTION,
    TWO_NORMS,
    Couplings,
)

FOUR_NORMS = Couplings(
    layer={
        **SPLIT_ATTENTION,
        **GATED_FFN,
        **TWO_NORMS,
        "pre_feedforward_layernorm": ("hidden",),
        "post_feedforward_layernorm": ("hidden",),
    },
    outside=EMBEDDING_AND_HEAD,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
)
"""Norms before and after each sub-block, within the residual branch."""

GEMMA2 = families.register("gemma2")(
    Family(
        model_types=("gemma2",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        couplings=FOUR_NORMS,
    )
)
