"""Granite (dense): Llama's layout, with factors for embeddings, attention and residuals."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.llama import LLAMA

GRANITE = families.register("granite")(
    replace(LLAMA, model_types=("granite",), writers=())  # a factor comes between
)
