"""Measures speed and size of a checkpoint on this machine, and the gain from sparsity."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.evaluation.generation import prompts_of_kinds
from secateur.evaluation.speed import BACKENDS, USUAL_BACKENDS, on_gpu, take_turns
from secateur.models.checkpoint import shard_files
from secateur.models.configuration import MTP, read_configuration, type_of
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.progress import Progress
from secateur.recipes.deploy import Sampling
from secateur.recipes.measure import BenchRecipe
from secateur.reporting.evaluate import BenchResult, DraftedBenchResult, DraftedSpeed
from secateur.runs.environment import choose_device, environment
from secateur.runs.folder import NOTES
from secateur.runs.output import write_record
from secateur.runtime.decode import Decoder, continued
from secateur.runtime.install import open_checkpoint
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.layer_forms import refuse_options, why_not
from secateur.runtime.load import load
from secateur.runtime.mtp import ModuleDecoder
from secateur.runtime.packed import device_for, is_packed
from secateur.runtime.speculative import Drafter, open_drafter, speculated
from secateur.steps.draft import promised
from secateur.steps.generate import positions_in

MOST_SECONDS = 30.0
"""No round begins after so many."""

NEW_TOKENS, DRAFTED_TOKENS = 8, 64
"""The default number of tokens of a round, and that of a text with a draft."""


def bench_recipe(recipe: BenchRecipe, progress: Progress) -> BenchResult | DraftedBenchResult:
    """Time a checkpoint at batch 1 with several backends, or with a draft and without, in turns.

    For a run folder, the result is also written to `secateur/bench.json`, unless there is a draft.
    """
    if recipe.draft is not None:
        return _bench_draft(recipe, recipe.draft, progress)
    model, prompt_tokens = recipe.model, recipe.prompt_tokens
    new_tokens = recipe.new_tokens or NEW_TOKENS
    for file in recipe.gguf:  # llama.cpp would say nothing of a file that is none
        if not Path(file).is_file():
            raise RecipeError("there is no such GGUF file", where=file, remedy="check the path")
        with Path(file).open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError("this is no GGUF file", where=file, remedy="check the path")
    folder = resolve(model, progress=progress).folder
    positions = positions_in(folder)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise RecipeError(
            f"the model has {positions} positions, for {prompt_tokens} prompt and {new_tokens} "
            "new tokens",
            where="--prompt-tokens",
            remedy="give fewer tokens",
        )
    compressed, (names, device) = is_packed(folder), _contenders(recipe, folder)
    packed = [name for name in names if name in BACKENDS and not BACKENDS[name].expand]
    if packed and not compressed:
        if recipe.contenders is not None:
            raise RecipeError(
                f"{packed[0]!r} needs a compressed model",
                where=model,
                remedy=f"secateur compress {shlex.quote(model)} --output SMALL, then bench SMALL; "
                "or leave it out",
            )
        names = [name for name in names if name not in packed]
    reader = open_checkpoint(folder)
    speeds = take_turns(
        [(name, folder) for name in dict.fromkeys([*names, *recipe.gguf])],
        prompt=_random_prompt(folder, prompt_tokens),
        new_tokens=new_tokens,
        rounds=recipe.rounds,
        seconds=MOST_SECONDS,
        device=str(device),
        progress=progress,
    )
    dense = sum(2 * torch.Size(entry.shape).numel() for entry in reader.entries.values())
    protocol = {
        "batch": 1,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": max(len(speed.each_token) for speed in speeds),
        "kernels": kernel_info().tier,
        **environment(device),
    }
    size = sum(file.stat().st_size for file in shard_files(folder))
    result = BenchResult.of(
        model, speeds, compressed=compressed, protocol=protocol, file_bytes=size, dense_bytes=dense
    )
    if (folder / NOTES).is_dir():
        write_record(folder / NOTES / "bench.json", result.to_json())
    return result


def _contenders(recipe: BenchRecipe, folder: Path) -> tuple[Sequence[str], torch.device]:
    """The ways to run a model, and where. `auto` is the CPU if one of them runs only there."""
    named, every = recipe.contenders or (), recipe.contenders == ("all",)
    ours = (name for name in named if name in BACKENDS and not on_gpu(name))
    device = choose_device(recipe.device, "--gguf" if recipe.gguf else next(ours, None))
    device = device_for(folder, recipe.device, device)
    if device.type == "cuda" and (every or not named):
        return [name for name in BACKENDS if on_gpu(name)], device
    return tuple(BACKENDS) if every else named or USUAL_BACKENDS, device


def _random_prompt(folder: Path, count: int) -> list[int]:
    """Token ids below 1000, which nearly every model has; always the same."""
    config = read_configuration(folder)
    ids = config.get("vocab_size", config.get("text_config", {}).get("vocab_size")) or 1000
    generator = torch.Generator().manual_seed(0)
    found: list[int] = torch.randint(0, min(1000, ids), (count,), generator=generator).tolist()
    return found


def _bench_draft(recipe: BenchRecipe, draft: str, progress: Progress) -> DraftedBenchResult:
    """Time a model with a draft and without, on the prompts of `KINDS`.

    Each text is written without the draft, and then with it. The first token, which the model's
    reading of the prompt gives, is not timed; the draft's reading is.

    Raises:
        SecateurError: as generating with a draft.
    """
    choose_device(recipe.device, "--draft")
    folder = resolve(recipe.model, progress=progress).folder
    tokenizer: Any = load_tokenizer(folder)
    prompts = prompts_of_kinds(tokenizer)
    new_tokens = recipe.new_tokens or DRAFTED_TOKENS
    model, room = load(folder), new_tokens + max(len(x) for own in prompts.values() for x in own)
    own, reason = resolve(draft).folder, why_not(model, room)
    refuse_options(reason, draft=None if type_of(own) == MTP else draft)
    decoder = (ModuleDecoder if reason else Decoder)(model, room)
    drafter, speeds = open_drafter(own, folder, decoder.slots, tokenizer), []
    progress.start("measuring", 2 * len(prompts))
    for temperature in (0.0, 1.0):
        for kind, texts in prompts.items():
            speeds.append(drafted_speed(decoder, drafter, kind, texts, new_tokens, temperature))
            progress.step(note=f"{kind} at temperature {temperature:g}")
    progress.finish()
    protocol = {"batch": 1, "new_tokens": new_tokens, "kernels": kernel_info().tier,
                **environment(torch.device("cpu"))}  # fmt: skip
    return DraftedBenchResult(
        model=recipe.model,
        draft=draft,
        expected=promised(own, recipe.model),
        speeds=tuple(speeds),
        protocol=protocol,
    )


def drafted_speed(
    decoder: Decoder,
    drafter: Drafter,
    kind: str,
    prompts: Sequence[Tensor],
    new_tokens: int,
    temperature: float,
) -> DraftedSpeed:
    """The times of the texts of one kind."""
    seconds, equal = [0.0, 0.0], True
    before = drafter.proposed, drafter.accepted
    for seed, ids in enumerate(prompts):
        sampling = Sampling(temperature=temperature, seed=seed)
        alone = continued(decoder, ids, new_tokens, sampling=sampling)
        drafted = speculated(decoder, drafter, ids, new_tokens, sampling=sampling)
        found = []
        for place, text in enumerate((alone, drafted)):
            tokens = [next(text)]
            began = time.perf_counter()
            tokens += text
            seconds[place] += time.perf_counter() - began
            found.append(tokens)
        equal = equal and found[0] == found[1]
    proposed, accepted = drafter.proposed - before[0], drafter.accepted - before[1]
    count = len(prompts) * (new_tokens - 1)
    return DraftedSpeed(
        kind=kind,
        temperature=temperature,
        tokens=count,
        alone_seconds=seconds[0],
        drafted_seconds=seconds[1],
        calls=count - accepted,
        proposed=proposed,
        accepted=accepted,
        equal=None if temperature else equal,
    )
