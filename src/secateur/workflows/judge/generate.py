"""Text from a checkpoint, compressed or not, and how fast it came."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from secateur.errors import RecipeError
from secateur.evaluation.generation import generate as generate_with_transformers
from secateur.models.configuration import read_configuration
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.schema import MAX_SEED
from secateur.reporting.results.generate import GenerateResult
from secateur.runtime.decode import Decoder, why_not
from secateur.runtime.load import load

__all__ = ["generate"]

POSITIONS = "max_position_embeddings"


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> GenerateResult:
    """Continue a prompt on the CPU, by the fastest way that the model allows.

    Args:
        model: folder (compressed or not), hub id, GGUF file or named sample.
        prompt: the text to continue, as it is, without a chat template.
        max_new_tokens: where to stop if the model does not end earlier.
        temperature: 0 takes the most likely token each time; above 0 draws.
        seed: of the draw.
        trust_remote_code: whether code that comes with the checkpoint may run.
        tell: given the text piece by piece as it comes.

    Raises:
        SecateurError: what, where, and what to do.
    """
    check_asked(prompt, max_new_tokens, temperature, seed)
    folder = resolve(model, trust_remote_code=trust_remote_code).folder
    check_length(max_new_tokens, positions_told(folder))
    started = time.perf_counter()
    loaded = load(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ready = time.perf_counter()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    if len(ids) == 0:
        raise RecipeError("the prompt has no token", remedy="give a prompt of at least one word")
    check_length(len(ids) + max_new_tokens, getattr(loaded.config, POSITIONS, None))
    reason = why_not(loaded, len(ids) + max_new_tokens)
    if reason is not None:
        text = generate_with_transformers(
            loaded, tokenizer, prompt, max_new_tokens, seed, temperature=temperature
        )
        tell(text)
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        rate, loop = count / (time.perf_counter() - ready), f"transformers: {reason}"
        return GenerateResult(model, prompt, text, count, ready - started, None, rate, loop)
    decoder = Decoder(loaded, len(ids) + max_new_tokens)
    ends = loaded.generation_config.eos_token_id
    stop = ends if isinstance(ends, list) else [] if ends is None else [ends]
    tokens: list[int] = []
    times: list[float] = []
    told = ""
    begun = time.perf_counter()
    for token in decoder.continued(
        ids, max_new_tokens, temperature=temperature, seed=seed, stop=stop
    ):
        times.append(time.perf_counter())
        tokens.append(token)
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if not text.endswith("\ufffd"):  # half of a character waits for the rest
            tell(text[len(told) :])
            told = text
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    first = times[0] - begun if times else None
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    tell(text[len(told) :])
    loop = "one call for each token"
    return GenerateResult(model, prompt, text, len(tokens), ready - started, first, speed, loop)


def check_asked(prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Refuse what makes no sense for any model.

    Raises:
        RecipeError: naming the option.
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise RecipeError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}",
            remedy="give at least one new token and a temperature of 0 or more",
        )
    if not 0 <= seed <= MAX_SEED:
        raise RecipeError(
            f"seed {seed} is not a number from 0 to 2⁶³ − 1", remedy="give a smaller one"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"the prompt is not text at character {error.start}: it has half of a surrogate pair",
            remedy="give the prompt as UTF-8",
        ) from None


def positions_told(folder: Path) -> int | None:
    """How many tokens the configuration says that the model reads."""
    told = read_configuration(folder).get(POSITIONS)
    return told if type(told) is int else None


def check_length(tokens: int, positions: int | None) -> None:
    """Refuse more tokens than the model has positions.

    Raises:
        RecipeError: naming both numbers.
    """
    if positions is not None and tokens > positions:
        raise RecipeError(
            f"prompt and new tokens are {tokens}, and the model has {positions} positions",
            where="--max-new-tokens",
            remedy=f"use a smaller number; prompt and new tokens together are at most {positions}",
        )
