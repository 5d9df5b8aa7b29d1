"""Speed and memory of cut SmolLM2-135M against what is left of its parameters, engine by engine.

    python -m benchmarks.speed.structure_speed [--work DIR] [--rounds 3] [--engines "llama.cpp, Q8_0" …]

Cuts: none, and width, depth and the middle of `structure.py`, each to about 90, 80 and 70 % of the
decoder's parameters. The first units stay: which ones go does not matter for speed, so nothing is
calibrated (`secateur.structured.surgery` alone), and texts are worthless. Neurons stay in multiples
of 32, a block of llama.cpp's Q8_0. llama.cpp gets no cut of the middle, whose layers differ.

Engines: transformers in float32, and llama.cpp with Q8_0.

Each model is a process of its own. Within an engine the models take turns
(`secateur.evaluation.speed`): a prompt of 256 tokens, then 32 new ones; medians over rounds, ratios
to the same engine's uncut model. Every finished engine is kept in the results at once, and skipped
when it is there. Memory is that of the process over one with the libraries alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.models.random_models import write_gguf
from benchmarks.quality.structure import MODEL, depth, middle, width
from benchmarks.stored import known_rows
from safetensors.torch import load_file

from secateur.evaluation.speed import take_turns
from secateur.models.checkpoint import shard_files
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.recipes.reading import build_recipe, nested
from secateur.recipes.structure import StructureRecipe
from secateur.structured.cut import Cut
from secateur.structured.cut_plan import plan_cut, representative, uniform_cut
from secateur.structured.design import Accounting, design
from secateur.structured.surgery import cut_checkpoint

MEASURES = ("src/secateur/structured/surgery.py", "src/secateur/runtime/kernels/csrc")
MINUTES = 9

MULTIPLE, LEVELS = 32, (0.1, 0.2, 0.3)
KINDS = {
    "width": width(),
    "depth": depth("influence"),
    "middle": middle(),
}


@dataclass(frozen=True)
class Model:
    """A cut model in one dtype, as a folder of transformers."""

    name: str
    folder: Path
    counted: Accounting


def as_stored(model: Model, work: Path) -> tuple[Path, Path]:
    """The folder itself."""
    return model.folder, model.folder


def q8_0(model: Model, work: Path) -> tuple[Path, Path]:
    """A GGUF file."""
    file = work / f"{model.folder.name}-q8_0.gguf"
    if not file.exists():
        config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
        tensors = {n: t for f in shard_files(model.folder) for n, t in load_file(f).items()}
        named = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
        unfinished = write_gguf(config, named, file.with_suffix(".unfinished"))
        unfinished.rename(file)
    return model.folder, file


@dataclass(frozen=True)
class Engine:
    """What runs a model.

    Attributes:
        dtype: of the checkpoint it is given.
        backend: in `secateur.evaluation.speed`; None for the path of what was made.
        made: from the checkpoint and a work folder, the folder that is loaded and what has the
            weights.
        without: kinds of cuts that it is not given.
    """

    dtype: str
    backend: str | None
    made: Callable[[Model, Path], tuple[Path, Path]]
    without: tuple[str, ...] = ()


ENGINES = {
    "transformers, float32": Engine("float32", "packed in transformers", as_stored),
    "llama.cpp, Q8_0": Engine("bfloat16", None, q8_0, ("middle",)),
}
"""Of what is not packed, the contenders `packed` run what is stored."""


def cuts(folder: Path, levels: list[float]) -> dict[str, Cut]:
    """The cuts of a model, by name."""
    skeleton = build_skeleton(folder)
    found = {"uncut": Cut()}
    for kind, options in KINDS.items():
        for level in levels:
            asked = {"model": str(folder), **options(level)}
            asked |= {} if kind == "depth" else {"multiple": MULTIPLE}
            plan = plan_cut(build_recipe(StructureRecipe, nested(StructureRecipe, asked)), skeleton)
            cut = representative(plan)
            narrowed = uniform_cut(plan, design(skeleton, cut).skeleton, MULTIPLE)
            found[f"{kind}, {level:.0%}"] = replace(
                cut, groups=narrowed.groups, neurons=narrowed.neurons
            )
    return found


def cut_models(source: str, dtype: str, levels: list[float], work: Path) -> list[Model]:
    """All models in a dtype; made again where they are there, since that takes seconds."""
    folder = in_dtype(source, dtype, work)
    found = []
    for name, cut in cuts(folder, levels).items():
        output = work / f"{name.replace(', ', '-').replace('%', '')}-{dtype}"
        found.append(Model(name, output, cut_checkpoint(folder, cut, output)))
    return found


def in_dtype(source: str, dtype: str, work: Path) -> Path:
    """The uncut model in a dtype."""
    folder = work / f"source-{dtype}"
    if not folder.exists():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            resolve(source).folder, dtype=getattr(torch, dtype)
        )
        model.save_pretrained(folder)
    return folder


def measured(name: str, models: list[Model], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one engine."""
    engine = ENGINES[name]
    models = [model for model in models if model.name.split(",")[0] not in engine.without]
    made = [engine.made(model, args.work) for model in models]
    vocabulary = build_skeleton(models[0].folder).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, min(1000, vocabulary), (args.prompt_tokens,), generator=generator)
    speeds = take_turns(
        [(engine.backend or str(weights), folder) for folder, weights in made],
        prompt=prompt.tolist(),
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        progress=Silent(),
    )
    rows = []
    for model, speed, (_, weights) in zip(models, speeds, made, strict=True):
        files = [weights] if weights.is_file() else shard_files(weights)
        rows.append(
            {
                "engine": name,
                "cut": model.name,
                "decoder_left": 1 - model.counted.decoder_removed,
                "parameters_left": 1 - model.counted.removed,
                "file_bytes": sum(file.stat().st_size for file in files),
                **speed.record(args.prompt_tokens).to_json(),
            }
        )
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an engine, beside the speed of its first one, the uncut model's."""
    dense = rows[0]
    for row in rows:
        if "failure" in row or "failure" in dense:
            print(f"{row['engine']}, {row['cut']}: {row.get('failure')}", flush=True)
            continue
        for key in ("tokens_per_second", "prompt_tokens_per_second"):
            row[f"{key}_ratio"] = row[key] / dense[key]
    return rows


def speeds(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """How much faster each engine runs cuts of width and of depth than the uncut model."""
    kinds = ("uncut", "width", "depth")
    found = {(r["engine"], r["cut"]): r for r in rows}
    engines = list(dict.fromkeys(engine for engine, _ in found))
    lines = []
    for cut in dict.fromkeys(cut for _, cut in found if cut.startswith(kinds)):
        own = [found[engine, cut] for engine in engines]
        shares = [f"{own[0][key]:.0%}" for key in ("decoder_left", "parameters_left")]
        cells = [
            f"{row[f'{key}_ratio']:.2f}"
            for row in own
            for key in ("tokens_per_second", "prompt_tokens_per_second")
        ]
        lines.append([cut.partition(",")[0], *shares, *cells])
    columns = [f"{engine}: {what}" for engine in engines for what in ("decode", "prompt")]
    return ["cut", "decoder left", "of all parameters", *columns], lines


TABLES = {"speeds": speeds}


def main() -> None:
    """Cut, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the models, kept")
    parser.add_argument("--levels", nargs="+", type=float, default=[*LEVELS])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=[*ENGINES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--name", default="structure-speed")
    args = parser.parse_args()
    print(heading())
    options = ("levels", "rounds", "prompt_tokens", "new_tokens")
    protocol = {"protocol": __doc__, **{key: getattr(args, key) for key in options}}
    rows = known_rows(args.name, protocol, heading())
    with tempfile.TemporaryDirectory() as scratch:
        args.work = args.work or Path(scratch)
        made: dict[str, list[Model]] = {}
        for name in args.engines:
            package = importlib.util.find_spec("llama_cpp_py_sync")
            if name.startswith("llama.cpp") and package is None:
                print(f"{name}: left out, it is not installed", flush=True)
                continue
            if any(row["engine"] == name for row in rows):
                continue
            started, dtype = time.monotonic(), ENGINES[name].dtype
            if dtype not in made:
                made[dtype] = cut_models(MODEL, dtype, args.levels, args.work)
            rows += measured(name, made[dtype], args)
            keep(args.name, protocol, rows)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(markdown(*speeds(rows)))


if __name__ == "__main__":
    main()
