"""StarCoder2: biases everywhere, LayerNorms, a feed-forward without a gate."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, families
from secateur.models.couplings import LLAMA_COUPLINGS, SPLIT_ATTENTION, TWO_NORMS
from secateur.models.families.llama import LLAMA

STARCODER2 = families.register("starcoder2")(
    replace(
        LLAMA,
        model_types=("starcoder2",),
        groups=(*SPLIT_ATTENTION_GROUPS, ("mlp.c_fc",), ("mlp.c_proj",)),
        writers=("self_attn.o_proj", "mlp.c_proj"),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **SPLIT_ATTENTION,
                **TWO_NORMS,
                "mlp.c_fc": ("neurons", "hidden"),
                "mlp.c_proj": ("hidden", "neurons"),
            },
        ),
    )
)
