"""Generate a text with a transformers model."""

from __future__ import annotations

from typing import Any

from secateur.errors import RecipeError
from secateur.evaluation.perplexity import evaluating
from secateur.models.tokenizer import Tokenizer
from secateur.runtime.captured import CapturedGeneration, why_not_captured
from secateur.runtime.decode import continued
from secateur.runtime.sampling import Sampling
from secateur.runtime.stepped import SteppedGeneration

GREEDY = Sampling()


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 40,
    sampling: Sampling = GREEDY,
) -> str:
    """Continue a prompt with transformers.

    Args:
        model: a transformers causal language model, on any device.
        tokenizer: the model's tokenizer.
        prompt: the text to continue, without a chat template.
        max_new_tokens: largest number of new tokens.
        sampling: how to sample tokens; by default always the most likely one.

    Returns:
        The new text, without the prompt.

    Raises:
        RecipeError: the prompt has no tokens, or a number is out of range.
    """
    if max_new_tokens < 1:
        raise RecipeError(
            f"max_new_tokens is {max_new_tokens}", remedy="give at least one new token"
        )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    if len(ids) == 0:
        raise RecipeError("the prompt has no token", remedy="give a prompt of at least one word")
    with evaluating(model):
        steps = token_steps(model, len(ids) + max_new_tokens)
        try:
            ends = end_tokens(model)
            tokens = [*continued(steps, ids, max_new_tokens, sampling=sampling, stop=ends)]
        finally:
            steps.close()
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def token_steps(model: Any, tokens: int) -> CapturedGeneration | SteppedGeneration:
    """What computes a text of so many tokens: on a GPU one graph for each token, if that works."""
    if model.device.type == "cuda" and why_not_captured(model) is None:
        return CapturedGeneration(model, tokens)
    return SteppedGeneration(model)


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation settings."""
    configured = model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in found if token is not None)
