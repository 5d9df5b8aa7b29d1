"""Speed and size of a checkpoint on this machine, and whether sparsity gains anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import RecipeError
from secateur.evaluation.contenders import CONTENDERS
from secateur.evaluation.speed import Speed, take_turns
from secateur.models.checkpoint import shard_files
from secateur.models.folder_checks import read_config
from secateur.models.sources import resolve
from secateur.progress import Progress
from secateur.registry import did_you_mean
from secateur.runs.atomic import write_json
from secateur.runs.environment import environment
from secateur.runs.folder import NOTES
from secateur.runs.output import cannot_write
from secateur.runs.records import Bench, declared
from secateur.runtime.dense_view import open_checkpoint
from secateur.runtime.kernels.library import kernel_info

__all__ = ["BenchReport", "bench"]

SCHEMA = "secateur.bench/1"


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Args:
        speeds: of the contenders.
        file_bytes: of the weight files.
        dense_bytes: of the same weights as dense bfloat16.
        protocol: how it was measured, and on what.
    """

    speeds: list[Speed]
    file_bytes: int
    dense_bytes: int
    protocol: dict[str, Any]

    def gain(self, over: Sequence[str]) -> tuple[str, float] | None:
        """The fastest of some contenders, and tokens a second of `packed` over its own."""
        ran = {s.name: s.tokens_per_second for s in self.speeds if s.failure is None}
        others = {name: ran[name] for name in over if name in ran}
        if "packed" not in ran or not others:
            return None
        best = max(others, key=lambda name: others[name])
        return best, ran["packed"] / others[best]

    @property
    def verdict(self) -> str:
        """In words, what the packed model gains over the fastest of all others."""
        found = self.gain([s.name for s in self.speeds if not s.name.startswith("packed")])
        if found is None:
            return "nothing to compare: the packed model or all others could not run"
        best, ratio = found
        if ratio < 1.02:
            return f"no gain: {best} is as fast or faster ({1 / ratio:.2f} times)"
        return f"{ratio:.2f} times as fast as {best}, the fastest of the others"

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        prompt = self.protocol["prompt_tokens"]
        return {
            "contenders": [s.to_json(prompt) for s in self.speeds],
            "file_bytes": self.file_bytes,
            "dense_bytes": self.dense_bytes,
            "verdict": self.verdict,
            "protocol": self.protocol,
        }


def bench(
    model: str | Path,
    *,
    contenders: Sequence[str] = CONTENDERS,
    gguf: Sequence[str | Path] = (),
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: Progress | None = None,
) -> BenchReport:
    """Time a checkpoint at batch 1, packed and in all other ways, in turns.

    In the folder of a pruning run the result is also written to `secateur/bench.json`.

    Args:
        model: folder, compressed or not; hub id, GGUF file or named sample.
        contenders: of `secateur.evaluation.contenders.CONTENDERS`.
        gguf: files for llama.cpp, which has to be installed (xllamacpp).
        prompt_tokens: length of the prompt, random tokens.
        new_tokens: to write in each round.
        rounds: that count; one more warms up.
        progress: told of every contender and round.

    Raises:
        RecipeError: a contender is unknown or a number out of range.
    """
    check_asked(contenders, gguf, prompt_tokens, new_tokens, rounds)
    folder = resolve(str(model)).folder
    reader = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, tokens_of(folder), (prompt_tokens,), generator=generator).tolist()
    names = dict.fromkeys([*contenders, *map(str, gguf)])
    speeds = take_turns(
        [(name, folder) for name in names],
        prompt=prompt,
        new_tokens=new_tokens,
        rounds=rounds,
        progress=progress,
    )
    dense = sum(2 * torch.Size(entry.shape).numel() for entry in reader.entries.values())
    protocol = {
        "batch": 1,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "kernels": kernel_info().tier,
        **environment(torch.device("cpu")),
    }
    size = sum(file.stat().st_size for file in shard_files(folder))
    report = BenchReport(speeds, size, dense, protocol)
    keep(report, str(model), folder)
    return report


def check_asked(
    contenders: Sequence[str],
    gguf: Sequence[str | Path],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> None:
    """Refuse what cannot be measured."""
    unknown = [name for name in contenders if name not in CONTENDERS]
    if unknown:
        raise RecipeError(
            f"unknown contender {unknown[0]!r}", remedy=did_you_mean(unknown[0], [*CONTENDERS])
        )
    if prompt_tokens < 1 or new_tokens < 2 or rounds < 1:
        raise RecipeError(
            f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, {rounds} rounds",
            remedy="at least 1, 2 and 1",
        )
    missing = [str(file) for file in gguf if not Path(file).exists()]
    if missing:
        raise RecipeError("there is no such GGUF file", where=missing[0])


def keep(report: BenchReport, model: str, folder: Path) -> None:
    """Write what was measured beside the records of a pruning run, if the folder has them."""
    if not (folder / NOTES).is_dir():
        return
    file = folder / NOTES / "bench.json"
    try:
        record = {"schema": SCHEMA, "model": model, **report.to_json()}
        write_json(file, declared(Bench, record))
    except OSError as error:
        raise cannot_write(error, file) from error


def tokens_of(folder: Path) -> int:
    """From how many tokens a prompt is drawn: a thousand, which nearly every model has."""
    config = read_config(folder)
    told = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return min(1000, told) if isinstance(told, int) else 1000
