"""What a fit can do for each engine that may run its result; anything else is refused before work.

| target                   | what a fit does                                                   |
|--------------------------|-------------------------------------------------------------------|
| cpu                      | all levels: our formats and kernels, timed on this machine        |
| any                      | all levels, no bound on time or memory: these belong to an engine |
| llama.cpp                | what a GGUF file holds; bounds on size and loss                   |
| vllm, transformers, h100 | refused, with what does the work instead                          |
"""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import RecipeError
from secateur.recipes.fit import FitRecipe

OF_AN_ENGINE = ("max_inference_memory", "decode_speedup")
"""Bounds that mean nothing without an engine."""

INSTEAD: Mapping[str, tuple[str, str]] = {
    "vllm": (
        "vLLM reads one scheme for all linears from compressed-tensors, w8a8 or w4a16, and gains "
        "nothing from zeros, so there is no mix to search",
        "secateur export MODEL --to compressed-tensors --type w8a8 or w4a16 makes both candidates",
    ),
    "transformers": (
        "transformers stores and multiplies dense bfloat16, so only cuts make a model smaller or "
        "faster there",
        "secateur structure MODEL --params or --layers makes them",
    ),
    "h100": (
        "2:4 zeros and fp8 are not measured here, and a fit predicts from measurements",
        "secateur advise MODEL --hardware h100-80gb gives published and estimated numbers",
    ),
}
"""Why there is no fit for a target, and what to do."""


def check_target(recipe: FitRecipe) -> None:
    """Refuse a target that a fit cannot serve.

    Raises:
        RecipeError: why, and what can be done.
    """
    if recipe.target in INSTEAD:
        why, remedy = INSTEAD[recipe.target]
        raise RecipeError(f"no fit for {recipe.target}: {why}", where="--target", remedy=remedy)
    bounded = [name for name in OF_AN_ENGINE if getattr(recipe, name) is not None]
    if recipe.target != "cpu" and bounded:
        raise RecipeError(
            f"{bounded[0]} needs times and memory of an engine, and only those of cpu are measured "
            f"here; the target is {recipe.target}",
            where="--target",
            remedy="give --target cpu, or bounds on size and loss",
        )
