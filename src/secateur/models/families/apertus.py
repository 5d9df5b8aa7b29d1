"""Apertus: normalised queries and keys, a feed-forward without a gate."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import HEAD_NORMS, LLAMA_COUPLINGS, PLAIN_FFN, SPLIT_ATTENTION
from secateur.models.families.arcee import ARCEE

APERTUS = families.register("apertus")(
    replace(
        ARCEE,
        model_types=("apertus",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **SPLIT_ATTENTION,
                **HEAD_NORMS,
                **PLAIN_FFN,
                "mlp.act_fn": ("-",),
                "attention_layernorm": ("hidden",),
                "feedforward_layernorm": ("hidden",),
            },
            attention_norms=("attention_layernorm",),
            ffn_norms=("feedforward_layernorm",),
        ),
    )
)
