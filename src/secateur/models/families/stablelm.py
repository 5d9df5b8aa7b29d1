"""StableLM 2 and StableLM 3B: Llama's linears, LayerNorms, partly rotated heads."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import LLAMA_COUPLINGS
from secateur.models.families.llama import LLAMA

STABLELM = families.register("stablelm")(
    replace(
        LLAMA,
        model_types=("stablelm",),
        couplings=replace(
            LLAMA_COUPLINGS,
            attention_norms=(),  # in the parallel form it serves the feed-forward too
            attributes={"self_attn": {"num_heads": "heads", "num_key_value_heads": "groups"}},
        ),
    )
)
