"""Gemma 2: four norms per layer, soft-capped attention, alternating windows."""

from secateur.models.architecture import SPLIT_ATTENTION_GATED_FFN, Family, families

GEMMA2 = families.register("gemma2")(
    Family(model_types=("gemma2",), layers="model.layers", groups=SPLIT_ATTENTION_GATED_FFN)
)
