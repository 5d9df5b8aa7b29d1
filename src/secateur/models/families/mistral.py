"""Mistral and Ministral: Llama's layout with sliding-window attention."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)
from secateur.models.couplings import LLAMA_COUPLINGS

MISTRAL = families.register("mistral")(
    Family(
        model_types=("mistral", "ministral", "ministral3"),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        writers=PRE_NORM_WRITERS,
        couplings=LLAMA_COUPLINGS,
    )
)
