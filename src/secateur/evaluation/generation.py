"""Generate texts with a transformers model, and look for repetitions.

A damaged model often repeats itself long before its perplexity shows the damage. So each text is
checked for repeated 4-grams:

    repetition = 1 − (different runs of four tokens) / (runs of four tokens)

A text is degenerate if more than half of its 4-grams are repeats, or if it is empty or only white
space. Small dense models repeat themselves too when they always take the most likely token. So only
the difference from the dense model says something about pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from secateur.errors import RecipeError
from secateur.evaluation.perplexity import evaluating, fingerprint
from secateur.models.tokenizer import Tokenizer
from secateur.progress import Progress, Silent
from secateur.recipes.deploy import Sampling
from secateur.runs.measured import SampleRecord
from secateur.runtime.decode import GREEDY, SteppedGeneration, continued
from secateur.runtime.sampling import end_tokens


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
    made = continuation(model, ids, max_new_tokens, sampling)
    if made and made[-1] in end_tokens(model):
        made.pop()
    return str(tokenizer.decode(made, skip_special_tokens=True))


def continuation(
    model: Any, ids: Int64[Tensor, " tokens"], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[int]:
    """The tokens with which a model continues a prompt.

    A text that ends before the limit has the end token as its last.

    Args:
        model: a transformers causal language model, on any device.
        ids: the prompt, at least one token.
        max_new_tokens: largest number of new tokens.
        sampling: how to sample tokens.
    """
    with evaluating(model):
        steps = SteppedGeneration(model)
        try:
            made, ends = list[int](), end_tokens(model)
            for token in continued(steps, ids, max_new_tokens, sampling=sampling):
                made.append(token)
                if token in ends:
                    break
        finally:
            steps.close()
    return made


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
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "prose": (
            "The old lighthouse stood at the end of the harbour wall. On the evening of the storm",
            "My grandmother kept bees behind the house. Every spring, before the first flowers,",
            "The history of glass begins long before anyone knew how to make it clear. At first",
            "Rain falls on the hills, runs into small streams, and then",
        ),
        "code": (
            "def read_table(path):\n"
            '    """Read a file of comma-separated values into a list of dictionaries."""\n    ',
            "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
            "# Count how often each word occurs in a text, and print the ten most frequent words.\n"
            "import collections\n\n",
            "SELECT customers.name, SUM(orders.total)\nFROM customers\nJOIN orders ON",
        ),
        "chat": (
            "User: My bicycle makes a clicking noise when I pedal. What can it be?\nAssistant:",
            "User: Can you explain to a child why the sky is blue?\nAssistant:",
            "User: I have eggs, rice and an onion. What can I cook?\n"
            "Assistant: You can make fried rice.\nUser: How do I do that?\nAssistant:",
            "User: Please write a short and polite message that cancels a meeting.\nAssistant:",
        ),
        "lists": (
            "Ten things to pack for a week of camping:\n1. A tent\n2. A sleeping bag\n3.",
            "The planets of the solar system, from the sun outwards:\n- Mercury\n-",
            "| animal | legs | where it lives |\n|---|---|---|\n| horse | 4 | meadow |\n| spider |",
            "Shopping list:\n- 2 litres of milk\n- 1 loaf of bread\n-",
        ),
    }
)
"""Prompts of four kinds of text; a model continues them itself. How often a model accepts the
tokens of a draft differs by kind."""


def prompts_of_kinds(tokenizer: Tokenizer) -> dict[str, list[Int64[Tensor, " tokens"]]]:
    """The token ids of the prompts of every kind of text."""
    return {
        kind: [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
        for kind, texts in KINDS.items()
    }


NEW_TOKENS = 64
RUN = 4
DEGENERATE = 0.5


def check_generation(
    model: Any,
    tokenizer: Tokenizer,
    *,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> list[SampleRecord]:
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
        samples.append(
            SampleRecord(
                prompt=prompt,
                text=text,
                repetition=share,
                degenerate=share > DEGENERATE or not text.strip(),
            )
        )
        progress.step()
    progress.finish()
    return samples


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that are repeats; 0 for fewer than four tokens.

    Example:
        >>> from secateur.evaluation.generation import repetition
        >>> repetition([1, 2, 3, 4, 5, 6, 7, 8])
        0.0
        >>> repetition([1, 1, 1, 1, 1, 1, 1, 1])
        0.8
    """
    runs = [tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def generation_protocol(prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Everything that the texts depend on besides the model, as JSON values."""
    return {
        "prompts": len(prompts),
        "prompt_texts": fingerprint(prompts),
        "new_tokens": NEW_TOKENS,
        "decoding": "greedy",
        "run_tokens": RUN,
        "degenerate_above": DEGENERATE,
    }
