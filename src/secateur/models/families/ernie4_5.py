"""ERNIE 4.5 (dense): Llama's layout."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.llama import LLAMA

ERNIE4_5 = families.register("ernie4_5")(replace(LLAMA, model_types=("ernie4_5",)))
