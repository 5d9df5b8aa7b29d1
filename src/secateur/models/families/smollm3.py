"""SmolLM3: Llama's layout; every fourth layer has no positions."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.llama import LLAMA

SMOLLM3 = families.register("smollm3")(replace(LLAMA, model_types=("smollm3",)))
