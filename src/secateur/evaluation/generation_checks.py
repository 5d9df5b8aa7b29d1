"""Continue a few prompts with the most likely tokens, and look for repetitions.

A damaged model often repeats itself long before its perplexity shows the damage. So each text is
checked for repeated 4-grams:

    repetition = 1 − (different runs of four tokens) / (runs of four tokens)

A text is degenerate if more than half of its 4-grams are repeats, or if it is empty or only white
space. Small dense models repeat themselves too when they always take the most likely token. So only
the difference from the dense model says something about pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.generation import generate
from secateur.evaluation.protocol import fingerprint
from secateur.models.tokenizer import Tokenizer
from secateur.progress import Progress, Silent

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
    """A text that a model generated.

    Args:
        prompt: the prompt.
        text: the generated text.
        repetition: share of its 4-grams that are repeats.
        degenerate: whether more than half are repeats, or the text is empty.
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
    """Continue prompts greedily, and measure repetitions.

    Args:
        model: a transformers causal language model.
        tokenizer: the model's tokenizer.
        prompts: texts to continue, without a chat template.
        new_tokens: largest number of new tokens for each prompt.
        progress: receives every prompt.
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
    """The share of runs of four tokens that are repeats; 0 for fewer than four tokens.

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
    """Everything that the texts depend on besides the model, as JSON values."""
    return {
        "prompts": len(prompts),
        "prompt_texts": fingerprint(prompts),
        "new_tokens": new_tokens,
        "decoding": "greedy",
        "run_tokens": RUN,
        "degenerate_above": DEGENERATE,
    }
