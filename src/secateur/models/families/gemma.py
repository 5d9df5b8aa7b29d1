"""Gemma (1): Llama's layout; norms add one to their weights, embeddings are scaled."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.couplings import LLAMA_COUPLINGS
from secateur.models.families.llama import LLAMA

GEMMA = families.register("gemma")(
    replace(
        LLAMA,
        model_types=("gemma",),
        couplings=replace(LLAMA_COUPLINGS, norm_offset=1.0, scaled_embedding=True),
    )
)
