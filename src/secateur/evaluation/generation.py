"""Text continued by a model: not a measurement, but what a person looks at first."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from secateur.errors import RecipeError
from secateur.evaluation.perplexity import evaluating
from secateur.models.tokenizer import Tokenizer

__all__ = ["generate"]


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 40,
    seed: int = 0,
    *,
    temperature: float = 0.0,
) -> str:
    """Continue a prompt.

    Args:
        model: a transformers causal language model.
        tokenizer: of that model.
        prompt: the text to continue, as it is, without a chat template.
        max_new_tokens: where to stop if the model does not end earlier.
        seed: of the draw; has no effect at temperature 0.
        temperature: 0 takes the most likely token each time; above 0 draws, softmax(logits / T).

    Returns:
        The new text alone.

    Raises:
        RecipeError: the prompt has no token, or a number is out of range.
    """
    from secateur.models.skeleton import quiet_transformers

    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise RecipeError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}",
            remedy="give at least one new token and a temperature of 0 or more",
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise RecipeError("the prompt has no token", remedy="give a prompt of at least one word")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.inference_mode(), evaluating(model), quiet_transformers():
        torch.manual_seed(seed)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
    return cast(str, tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
