"""OLMo 2: Llama's linears, norms after each block instead of before."""

from secateur.models.architecture import SPLIT_ATTENTION_GATED_FFN, Family, families

OLMO2 = families.register("olmo2")(
    Family(model_types=("olmo2",), layers="model.layers", groups=SPLIT_ATTENTION_GATED_FFN)
)
