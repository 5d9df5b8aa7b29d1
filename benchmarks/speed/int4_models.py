"""Whole models at batch 1 with weights of 4 and 8 bits, with zeros and without, and llama.cpp.

    python -m benchmarks.speed.int4_models [--work DIR] [--rounds 7] [--models 1.1b smollm2]
        [--prompt 64]

A random model of TinyLlama's shape (1.1 billion parameters). All layers have the numbers of one
random layer, each in memory of its own; speed does not depend on the numbers. Real SmolLM2-135M is
on the first page; `advice.py` takes its shape from here. Contenders of a model take turns in one run: int8 and int4 in groups of 64, stored dense and with a
bitmask, with 50 % and 70 % zeros in each row of the decoder's linears, or two of four; llama.cpp
with every matrix in Q4_0. Embedding and head have the bits of the others. A prompt of `--prompt`
tokens, 32 new ones, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
from benchmarks.hardware import heading, keep, markdown
from benchmarks.models.random_models import SHAPE, random_tensors, write_checkpoint, write_gguf

import secateur
from secateur.evaluation.speed import take_turns
from secateur.runtime.packed import PackedCheckpoint, PlannedFile, write_packed

MEASURES = ("src/secateur/runtime/kernels/csrc", "src/secateur/runtime/decode.py")
MINUTES = 8

PROMPT_TOKENS, NEW_TOKENS = 64, 32
SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": SHAPE,
    "smollm2": {
        **SHAPE,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
STORED: dict[str, dict[str, Any]] = {
    "50 % int8": {"values": "int8", "format": "bitmask", "embeddings": "int8"},
    "dense int8": {"values": "int8", "format": "dense", "embeddings": "int8"},
    "dense int4": {"values": "int4", "format": "dense", "embeddings": "int4"},
    "50 % int4": {"values": "int4", "format": "bitmask", "embeddings": "int4"},
    "2:4 int4": {"values": "int4", "embeddings": "int4"},
    "70 % int4": {"values": "int4", "format": "bitmask", "embeddings": "int4"},
}


def in_all_layers(names: list[str], layers: int) -> list[tuple[str, str]]:
    """Names of a model of many layers, each with the name in a model of one layer."""
    first = "model.layers.0."
    outer = [(name, name) for name in names if not name.startswith(first)]
    within = [name.removeprefix(first) for name in names if name.startswith(first)]
    return outer + [
        (f"model.layers.{i}.{name}", first + name) for i in range(layers) for name in within
    ]


def repeated(one: Path, layers: int, folder: Path) -> None:
    """A compressed checkpoint of many layers, all like the only one of another."""
    packed = PackedCheckpoint(one)
    names = dict(in_all_layers(sorted(packed.specs), layers))
    layouts = dict(in_all_layers(sorted(packed.layouts), layers))
    planned = PlannedFile(
        "secateur.safetensors",
        {name: packed.specs[source] for name, source in names.items()},
        {name: packed.layouts[source] for name, source in layouts.items()},
    )
    known = {source: packed.read(source) for source in packed.specs}
    folder.mkdir()
    write_packed(folder, [planned], ((name, known[source]) for name, source in names.items()))
    config = json.loads((one / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)  # those of one layer
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def zeros_of(name: str) -> str:
    """The zeros of a contender; dense ones have the weights of half zeros."""
    return name.rpartition(" ")[0] if name[0].isdigit() else "50 %"


def make(shape: dict[str, Any], work: Path) -> list[tuple[str, Path]]:
    """The contenders of a shape, made unless they are there."""
    gguf_file = work / "q4_0.gguf"
    if not gguf_file.exists():
        shutil.rmtree(work, ignore_errors=True)
        one, layers = {**shape, "num_hidden_layers": 1}, shape["num_hidden_layers"]
        for zeros in dict.fromkeys(map(zeros_of, STORED)):
            folder = work / f"one {zeros.replace(':', ' of ')}"
            write_checkpoint(one, random_tensors(one, zeros), folder)
            for name, stored in STORED.items():
                if zeros_of(name) == zeros:
                    to = work / f"one {folder_of(name)}"
                    secateur.compress(folder, output=to, **stored)
                    repeated(to, layers, work / folder_of(name))
        tensors = random_tensors(one)
        names = in_all_layers(sorted(tensors), layers)
        kind = gguf.GGMLQuantizationType.Q4_0
        unfinished = work / "unfinished.gguf"
        write_gguf(shape, {name: tensors[source] for name, source in names}, unfinished, kind)
        unfinished.rename(gguf_file)
    return [("packed", work / folder_of(name)) for name in STORED] + [(str(gguf_file), work)]


def folder_of(name: str) -> str:
    """The folder of a contender."""
    return name.replace(":", " of ")


LLAMA_CPP = "llama.cpp Q4_0"


def measured(model: str, work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    draw, tokens = random.Random(0), args.prompt
    prompt = [draw.randrange(300, SHAPES[model]["vocab_size"]) for _ in range(tokens)]
    made = dict(zip([*STORED, LLAMA_CPP], make(SHAPES[model], work), strict=True))
    chosen = {name: made[name] for name in args.contenders}
    found = take_turns([*chosen.values()], prompt=prompt, new_tokens=NEW_TOKENS, rounds=args.rounds)
    rows = []
    for name, speed in zip(chosen, found, strict=True):
        rows.append({"model": model, **speed.record(tokens).to_json(), "contender": name})
        rows[-1]["each_token_seconds"] = list(speed.each_token)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation; also relative to dense int4, medians and fastest rounds."""
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append([row["model"], row["contender"], row["failure"], "", "", "", ""])
            continue
        own = next(r for r in rows if r["model"] == row["model"] and r["contender"] == "dense int4")
        lines.append(
            [
                row["model"],
                row["contender"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['tokens_per_second'] / own['tokens_per_second']:.2f}",
                f"{row['tokens_per_second_most'] / own['tokens_per_second_most']:.2f}",
                f"{1e3 * row['first_token_seconds']:.0f} ms",
                f"{row['resident_bytes'] / 2**20:.0f} MiB",
            ]
        )
    columns = ["model", "", "tokens/s", "of dense int4", "fastest rounds"]
    return markdown([*columns, "first token", "memory"], lines)


def models(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Speed, time of the prompt and memory; speed and prompt also relative to llama.cpp."""
    lines = []
    for row in (r for r in rows if r["model"] == "1.1b"):
        same = (r for r in rows if r["model"] == row["model"] and r["contender"] == LLAMA_CPP)
        theirs = next(same)
        faster = row["tokens_per_second"] / theirs["tokens_per_second"]
        sooner = theirs["first_token_seconds"] / row["first_token_seconds"]
        lines.append([
            row["model"], row["contender"], f"{row['tokens_per_second']:.1f}", f"{faster:.2f} ×",
            f"{1e3 * row['first_token_seconds']:.0f} ms", f"{sooner:.1f} ×",
            f"{row['resident_bytes'] / 2**20:.0f} MiB",
        ])  # fmt: skip
    of = "of llama.cpp"
    return ["model", "", "tokens/s", of, "first token", "sooner than llama.cpp", "memory"], lines


TABLES = {"models": models}


def main() -> None:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the models, kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=PROMPT_TOKENS, help="tokens")
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=["1.1b"])
    parser.add_argument("--contenders", nargs="+", default=[*STORED, LLAMA_CPP])
    parser.add_argument("--only-make", action="store_true", help="make the models, measure nothing")
    parser.add_argument("--name", default="int4-models")
    args = parser.parse_args()
    print(heading())
    given, rows = {"rounds": args.rounds, "prompt": args.prompt}, []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            work = (args.work or Path(scratch)) / model
            if args.only_make:
                make(SHAPES[model], work)
            else:
                rows += measured(model, work, args)
                keep(args.name, {"protocol": __doc__, **given}, rows)
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
