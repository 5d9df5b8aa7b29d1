"""Measures speed and size of a checkpoint on this machine, and the gain from sparsity."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from secateur.errors import RecipeError
from secateur.evaluation.speed import BACKENDS, USUAL_BACKENDS, take_turns
from secateur.models.checkpoint import shard_files
from secateur.models.configuration import read_configuration
from secateur.models.sources import resolve
from secateur.progress import Progress
from secateur.recipes.measure import BenchRecipe
from secateur.reporting.evaluate import BenchResult
from secateur.runs.environment import environment
from secateur.runs.folder import NOTES
from secateur.runs.output import write_record
from secateur.runtime.install import open_checkpoint
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.packed import is_packed
from secateur.steps.generate import positions_in


def bench_recipe(recipe: BenchRecipe, progress: Progress) -> BenchResult:
    """Time a checkpoint at batch 1 with several backends, in turns.

    For a run folder, the result is also written to `secateur/bench.json`.
    """
    model, new_tokens, prompt_tokens = recipe.model, recipe.new_tokens, recipe.prompt_tokens
    names: Sequence[str] = recipe.contenders or USUAL_BACKENDS
    if names == ("all",):
        names = BACKENDS
    missing = [file for file in recipe.gguf if not Path(file).exists()]
    if missing:
        raise RecipeError("there is no such GGUF file", where=missing[0], remedy="check the path")
    folder = resolve(model, progress=progress).folder
    positions = positions_in(folder)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise RecipeError(
            f"the model has {positions} positions, for {prompt_tokens} prompt and {new_tokens} "
            "new tokens",
            where="--prompt-tokens",
            remedy="give fewer tokens",
        )
    compressed = is_packed(folder)
    if not compressed:
        names = _without_packed(names, model, chosen=recipe.contenders is not None)
    reader = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, tokens_of(folder), (prompt_tokens,), generator=generator).tolist()
    speeds = take_turns(
        [(name, folder) for name in dict.fromkeys([*names, *recipe.gguf])],
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=recipe.rounds,
        seconds=recipe.seconds,
        progress=progress,
    )
    dense = sum(2 * torch.Size(entry.shape).numel() for entry in reader.entries.values())
    protocol = {
        "batch": 1,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": max(len(speed.each_token) for speed in speeds),
        "kernels": kernel_info().tier,
        **environment(torch.device("cpu")),
    }
    size = sum(file.stat().st_size for file in shard_files(folder))
    result = BenchResult(model, compressed, speeds, size, dense, protocol)
    if (folder / NOTES).is_dir():
        write_record(folder / NOTES / "bench.json", result.record.to_json())
    return result


def _without_packed(names: Sequence[str], model: str, *, chosen: bool) -> list[str]:
    """Return the contenders of a model without packed weights."""
    packed = [name for name in names if name.startswith("packed")]
    if packed and chosen:
        raise RecipeError(
            f"{packed[0]!r} needs a compressed model",
            where=model,
            remedy=f"secateur compress {shlex.quote(model)} --output SMALL, then bench SMALL; "
            "or leave it out",
        )
    return [name for name in names if name not in packed]


def tokens_of(folder: Path) -> int:
    """The number of token ids that a prompt is drawn from: 1000; nearly every model has them."""
    config = read_configuration(folder)
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return min(1000, size) if isinstance(size, int) else 1000
