"""Hunyuan (dense): Llama's layout with normalised queries and keys."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import LLAMA_COUPLINGS
from secateur.models.families.llama import LLAMA

HUNYUAN = families.register("hunyuan")(
    replace(
        LLAMA,
        model_types=("hunyuan_v1_dense",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                "self_attn.query_layernorm": ("-",),
                "self_attn.key_layernorm": ("-",),
            },
        ),
    )
)
