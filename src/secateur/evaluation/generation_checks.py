"""What a model writes when nobody measures: a few prompts, continued by the likeliest token.

A damaged model often falls into a loop long before its perplexity tells. So the share of repeated
4-grams is counted in each text:

    repetition = 1 − (different runs of four tokens) / (runs of four tokens)

A text is degenerate if more than half of its 4-grams are repeats, or if there is nothing in it but
white space. Small dense models loop too when they always take the likeliest token: only the
difference to the reference says something about pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.generation import generate
from secateur.evaluation.protocol import fingerprint
from secateur.models.tokenizer import Tokenizer
from secateur.progress import Progress, Silent

__all__ = ["PROMPTS", "Sample", "check_generation", "generation_protocol", "repetition"]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old woman who",
    "To make a simple tomato soup, first",
    "Water boils when it is heated because",
    "Question: Anna has 12 apples. She gives 5 to Tom and buys 3 more. "
    "How many does she have now?\nAnswer:",
    "def is_prime(n):\n    ",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "The three most important differences between a river and a lake are:\n1.",
)
NEW_TOKENS = 64
RUN = 4
DEGENERATE = 0.5


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote.

    Args:
        prompt: what was given.
        text: what followed.
        repetition: share of its 4-grams that came before.
        degenerate: whether that is more than half, or there is no text.
    """

    prompt: str
    text: str
    repetition: float
    degenerate: bool


def check_generation(
    model: Any,
    tokenizer: Tokenizer,
    *,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> list[Sample]:
    """Let a model continue prompts, greedily, and look for loops.

    Args:
        model: a transformers causal language model.
        tokenizer: of that model.
        prompts: texts to continue, without a chat template.
        new_tokens: at most so many for each.
        progress: told of every prompt.
    """
    progress = progress or Silent()
    progress.start("generation", len(prompts))
    samples = []
    for prompt in prompts:
        text = generate(model, tokenizer, prompt, new_tokens)
        share = repetition(tokenizer(text, add_special_tokens=False)["input_ids"])
        samples.append(Sample(prompt, text, share, share > DEGENERATE or not text.strip()))
        progress.step()
    progress.finish()
    return samples


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that came before; 0 for fewer than four tokens.

    Example:
        >>> from secateur.evaluation.generation_checks import repetition
        >>> repetition([1, 2, 3, 4, 5, 6, 7, 8])
        0.0
        >>> repetition([1, 1, 1, 1, 1, 1, 1, 1])
        0.8
    """
    runs = [tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def generation_protocol(
    prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """What the texts depend on besides the model, as JSON values."""
    return {
        "prompts": len(prompts),
        "prompt_texts": fingerprint(prompts),
        "new_tokens": new_tokens,
        "decoding": "greedy",
        "run_tokens": RUN,
        "degenerate_above": DEGENERATE,
    }
