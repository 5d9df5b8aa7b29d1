"""Mixtral: Mistral's attention, and experts of which each token is sent to two."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Experts, Family, families
from secateur.models.couplings import FUSED_EXPERTS, LLAMA_COUPLINGS, SIZES_OF_EXPERTS

MIXTRAL = families.register("mixtral")(
    Family(
        model_types=("mixtral",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **FUSED_EXPERTS},
            attributes=SIZES_OF_EXPERTS,
        ),
        experts=Experts(stored=("w1", "w3", "w2"), count="num_local_experts"),
    )
)
