"""Nemotron (Minitron) and Jais 2: LayerNorms, and a feed-forward without a gate."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.arcee import ARCEE

NEMOTRON = families.register("nemotron")(replace(ARCEE, model_types=("nemotron", "jais2")))
