"""Helium: Llama's layout; heads are as many as the hidden size has room for."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.llama import LLAMA

HELIUM = families.register("helium")(replace(LLAMA, model_types=("helium",)))
