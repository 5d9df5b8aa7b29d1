"""Arcee (AFM): Llama's attention, and a feed-forward without a gate."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, families
from secateur.models.couplings import LLAMA_COUPLINGS, PLAIN_FFN, SPLIT_ATTENTION, TWO_NORMS
from secateur.models.families.llama import LLAMA

ARCEE = families.register("arcee")(
    replace(
        LLAMA,
        model_types=("arcee",),
        groups=(*SPLIT_ATTENTION_GROUPS, ("mlp.up_proj",), ("mlp.down_proj",)),
        couplings=replace(LLAMA_COUPLINGS, layer={**SPLIT_ATTENTION, **PLAIN_FFN, **TWO_NORMS}),
    )
)
