"""Gemma 3 (text): five local layers to one global, with rotary tables of their own."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GATED_FFN, Family, families
from secateur.models.couplings import HEAD_NORMS
from secateur.models.families.gemma2 import FOUR_NORMS

GEMMA3 = families.register("gemma3")(
    Family(
        model_types=("gemma3_text",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        couplings=replace(FOUR_NORMS, layer={**FOUR_NORMS.layer, **HEAD_NORMS}),
    )
)
