"""Generate text with a transformers model, all at once or token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.errors import RecipeError
from secateur.evaluation.perplexity import evaluating
from secateur.models.tokenizer import Tokenizer
from secateur.runtime.sampling import Sampling

__all__ = ["generate", "stream_tokens"]

GREEDY = Sampling()


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 40,
    sampling: Sampling = GREEDY,
) -> str:
    """Continue a prompt.

    Args:
        model: a transformers causal language model.
        tokenizer: the model's tokenizer.
        prompt: the text to continue, without a chat template.
        max_new_tokens: largest number of new tokens.
        sampling: how to sample tokens; by default always the most likely one.

    Returns:
        The new text, without the prompt.

    Raises:
        RecipeError: the prompt has no tokens, or a number is out of range.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    tokens: list[int] = []

    def take(token: int) -> bool:
        tokens.append(token)
        return True

    stream_tokens(model, tokenizer, ids, max_new_tokens, sampling, take)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def stream_tokens(
    model: Any,
    tokenizer: Tokenizer,
    ids: Int64[Tensor, " tokens"],
    max_new_tokens: int,
    sampling: Sampling,
    take: Callable[[int], bool],
) -> None:
    """Pass each new token to a function as soon as it is sampled.

    The token that ends the text, such as `</s>`, is passed too.

    Args:
        model: a transformers causal language model, on any device.
        tokenizer: the model's tokenizer.
        ids: token ids of the prompt.
        max_new_tokens: largest number of new tokens.
        sampling: how to sample tokens.
        take: receives each token; returns False to end the text.

    Raises:
        RecipeError: the prompt has no tokens, or `max_new_tokens` is less than 1.
    """
    from transformers import StoppingCriteriaList

    from secateur.models.skeleton import quiet_transformers

    if max_new_tokens < 1:
        raise RecipeError(
            f"max_new_tokens is {max_new_tokens}", remedy="give at least one new token"
        )
    if len(ids) == 0:
        raise RecipeError("the prompt has no token", remedy="give a prompt of at least one word")
    prompt = ids[None].to(model.device)
    listener = TokenListener(take)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.inference_mode(), evaluating(model), quiet_transformers():
        torch.manual_seed(sampling.seed)
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=listener,
            stopping_criteria=StoppingCriteriaList([listener.stops]),
            **options_of(sampling),
        )


def options_of(sampling: Sampling) -> dict[str, Any]:
    """The sampling settings as options of transformers' `generate`."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
    }


class TokenListener:
    """Receives tokens from transformers' `generate` (a "streamer" there)."""

    def __init__(self, take: Callable[[int], bool]) -> None:
        self.take = take
        self.prompt_seen = self.stopped = False

    def put(self, value: Tensor) -> None:
        """Receive the next token. The first call passes the prompt."""
        if not self.prompt_seen:
            self.prompt_seen = True
        elif not self.stopped:
            self.stopped = not self.take(int(value.reshape(-1)[0]))

    def end(self) -> None:
        """Called after the last token; does nothing."""

    def stops(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each sequence ends here. transformers calls this after each token."""
        return torch.full((len(ids),), self.stopped, dtype=torch.bool, device=ids.device)
