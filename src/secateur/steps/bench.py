"""Measures speed and size of a checkpoint on this machine, and the gain from sparsity."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from secateur.errors import RecipeError
from secateur.evaluation.speed import BACKENDS, USUAL_BACKENDS, take_turns
from secateur.models.checkpoint import shard_files
from secateur.models.configuration import read_config
from secateur.models.sources import resolve
from secateur.progress import Progress, listener
from secateur.registry import did_you_mean
from secateur.reporting.evaluate import BenchResult
from secateur.runs.atomic import write_json
from secateur.runs.environment import environment
from secateur.runs.folder import NOTES
from secateur.runs.output import cannot_write
from secateur.runtime.install import open_checkpoint
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.packed import is_packed
from secateur.steps.generate import positions_in


def bench(
    model: str | Path,
    *,
    contenders: Sequence[str] | None = None,
    gguf: Sequence[str | Path] = (),
    prompt_tokens: int = 32,
    new_tokens: int = 8,
    rounds: int = 5,
    seconds: float = 30,
    progress: Progress | None = None,
) -> BenchResult:
    """Time a checkpoint at batch 1 with several contenders (packed and others), in turns.

    For a run folder, the result is also written to `secateur/bench.json`.

    Args:
        model: folder, compressed or not; hub id, GGUF file or named sample.
        contenders: names from `secateur.evaluation.speed.BACKENDS`; None for the default
            ones. Packed contenders need a compressed model.
        gguf: files for llama.cpp, which must be installed (xllamacpp).
        prompt_tokens: length of the prompt of random tokens.
        new_tokens: number of tokens to generate in each round.
        rounds: maximum number of rounds.
        seconds: no round begins after this many seconds, but there are at least two rounds.
        progress: receives every contender and round.

    Raises:
        RecipeError: a contender is unknown or needs a compressed model, or a number is out of
            range.
    """
    names = USUAL_BACKENDS if contenders is None else contenders
    _check_asked(names, gguf, prompt_tokens, new_tokens, rounds, seconds)
    progress = listener(progress)
    folder = resolve(str(model), progress=progress).folder
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
        names = _without_packed(names, model, chosen=contenders is not None)
    reader = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, tokens_of(folder), (prompt_tokens,), generator=generator).tolist()
    speeds = take_turns(
        [(name, folder) for name in dict.fromkeys([*names, *map(str, gguf)])],
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        seconds=seconds,
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
    result = BenchResult(str(model), compressed, speeds, size, dense, protocol)
    _write_record(result, folder)
    return result


def _without_packed(names: Sequence[str], model: str | Path, *, chosen: bool) -> list[str]:
    """Return the contenders of a model without packed weights."""
    packed = [name for name in names if name.startswith("packed")]
    if packed and chosen:
        raise RecipeError(
            f"{packed[0]!r} needs a compressed model",
            where=str(model),
            remedy=f"secateur compress {shlex.quote(str(model))} --output SMALL, then bench SMALL; "
            "or leave it out",
        )
    return [name for name in names if name not in packed]


def _check_asked(
    contenders: Sequence[str],
    gguf: Sequence[str | Path],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    seconds: float,
) -> None:
    """Refuse measurements that are impossible."""
    unknown = [name for name in contenders if name not in BACKENDS]
    if unknown:
        raise RecipeError(
            f"unknown contender {unknown[0]!r}", remedy=did_you_mean(unknown[0], [*BACKENDS])
        )
    if prompt_tokens < 1 or new_tokens < 2 or rounds < 1:
        raise RecipeError(
            f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, {rounds} rounds",
            remedy="at least 1, 2 and 1",
        )
    if not seconds > 0:
        raise RecipeError(f"{seconds} seconds of measuring", remedy="give more than 0")
    missing = [str(file) for file in gguf if not Path(file).exists()]
    if missing:
        raise RecipeError("there is no such GGUF file", where=missing[0], remedy="check the path")


def _write_record(report: BenchResult, folder: Path) -> None:
    """Write the results next to the records of a pruning run, if the folder has them."""
    if not (folder / NOTES).is_dir():
        return
    file = folder / NOTES / "bench.json"
    try:
        write_json(file, report.record.to_json())
    except OSError as error:
        raise cannot_write(error, file) from error


def tokens_of(folder: Path) -> int:
    """The number of token ids that a prompt is drawn from: 1000; nearly every model has them."""
    config = read_config(folder)
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return min(1000, size) if isinstance(size, int) else 1000
