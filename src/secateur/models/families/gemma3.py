"""Gemma 3 (text): five local layers to one global, with rotary tables of their own."""

from secateur.models.architecture import SPLIT_ATTENTION_GATED_FFN, Family, families

GEMMA3 = families.register("gemma3")(
    Family(model_types=("gemma3_text",), layers="model.layers", groups=SPLIT_ATTENTION_GATED_FFN)
)
