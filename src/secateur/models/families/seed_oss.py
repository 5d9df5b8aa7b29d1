"""Seed-OSS: Llama's layout with biases on q, k and v."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.llama import LLAMA

SEED_OSS = families.register("seed_oss")(replace(LLAMA, model_types=("seed_oss",)))
