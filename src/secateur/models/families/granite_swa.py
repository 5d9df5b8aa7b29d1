"""Granite with sliding windows: attention sinks, one for each query head."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import LLAMA_COUPLINGS
from secateur.models.families.granite import GRANITE

GRANITE_SWA = families.register("granite_swa")(
    replace(
        GRANITE,
        model_types=("granite_swa",),
        couplings=replace(
            LLAMA_COUPLINGS, layer={**LLAMA_COUPLINGS.layer, "self_attn.sinks": ("heads",)}
        ),
    )
)
