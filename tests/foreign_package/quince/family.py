"""OLMo 1, which Secateur itself does not declare."""

from secateur.models.architecture import (
    PRE_NORM_WRITERS,
    SPLIT_ATTENTION_GATED_FFN,
    Family,
    families,
)

QUINCE = families.register("quince")(
    Family(
        model_types=("olmo",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GATED_FFN,
        writers=PRE_NORM_WRITERS,
    )
)
