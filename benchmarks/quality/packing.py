"""What packing changes of a pruned model: nothing in bfloat16, next to nothing in int8.

    python -m benchmarks.quality.packing PRUNED [--text NAME=FILE …] [--windows 24] [--calibration FILE]

1. Greedy text, ten prompts of 64 tokens each: the pruned model in bfloat16 values against the same
   packed, both computing in float32 (`secateur.load(dtype=float32)`; one call for each token), so
   that what is compared is packing, and not how a bfloat16 sum happens to be rounded. How many
   texts are the same when both compute in bfloat16 is told beside it.
2. Perplexity, windows of 2048 tokens: bfloat16 values, and int8 values, each weight rounded to the
   nearest or all of a row together (`--calibration`: 64 windows of 512 tokens, which are not of the
   judged texts); linears only, and embedding and head too; float activations (torch's products) and
   activations rounded to int8 (as kernels compute tokens and prompts).
3. Sizes of the files and memory of the loaded model, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep

import secateur
from secateur.models.checkpoint import shard_files
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.decode import Decoder, continued

MEASURES = ("src/secateur/runtime",)

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
    "The most important thing about learning to cook is",
    "def fibonacci(n):",
    "In 1969, astronauts first",
    "The mitochondria are",
    "To plant a tree, first",
    "She opened the letter and read:",
    "The difference between weather and climate is",
)
NEW_TOKENS = 64
MEMORY = """
import sys, json, psutil, torch, secateur
process = psutil.Process()
secateur.load  # the libraries are loaded now, the model is not
import secateur.runtime.load, transformers.models.llama.modeling_llama
before = process.memory_info().rss
model = secateur.load(sys.argv[1], expand=sys.argv[2] == "dense")
print(json.dumps(process.memory_info().rss - before))
"""


def texts(model: Any, tokenizer: Any, *, one_call: bool) -> list[list[int]]:
    """The most likely 64 tokens after each prompt."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if one_call:
            decoder = Decoder(model, ids.shape[1] + NEW_TOKENS)
            found.append(list(continued(decoder, ids[0], NEW_TOKENS)))
            continue
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        found.append(tokens[0, ids.shape[1] :].tolist())
    return found


def same_texts(folder: Path, tokenizer: Any, dtype: torch.dtype) -> dict[str, int]:
    """How many texts are those of the dense model in the same values."""
    dense = texts(secateur.load(folder, dtype=dtype, expand=True), tokenizer, one_call=False)
    model = secateur.load(folder, dtype=dtype)
    return {
        mode: sum(a == b for a, b in zip(dense, texts(model, tokenizer, one_call=one), strict=True))
        for mode, one in (("one call a token", True), ("packed in transformers", False))
    }


def perplexity(folder: Path, text: str, windows: int, *, rounded: bool = False) -> float:
    """Of a packed folder; `rounded` as it runs, otherwise with activations as they are."""
    model = secateur.load(folder, expand=not rounded)
    tokenizer = load_tokenizer(folder)
    judged = secateur.evaluate(
        model, text=text, tokenizer=tokenizer, sequence_length=2048, windows=windows
    )
    return float(judged.perplexity)


def judged(folders: dict[str, Path], text: str, windows: int) -> dict[str, float]:
    """Perplexity of every folder that can give another one than the first, and of the last one's
    activations rounded."""
    found = {
        name: perplexity(folder, text, windows)
        for name, folder in folders.items()
        if "archive" not in name
    }
    name, folder = list(folders.items())[-1]
    found[f"{name}, activations"] = perplexity(folder, text, windows, rounded=True)
    return found


def memory(folder: Path, how: str) -> int:
    """Bytes that loading adds to a process."""
    command = [sys.executable, "-c", MEMORY, str(folder), how]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1]))


def values(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Perplexity by the values of the linear layers, activations not rounded."""
    wiki, c4 = rows[0]["perplexity"]["wikitext2"], rows[0]["perplexity"]["c4"]
    named = ("bfloat16", "int8 nearest", "int8 calibrated", "int8 calibrated, embeddings")

    def shown(found: dict[str, float], name: str) -> str:
        more = found[name] / found["bfloat16"] - 1
        return f"{found[name]:.2f}" + (f" ({more:+.2%})" if name != "bfloat16" else "")

    lines = [[name, shown(wiki, name), shown(c4, name)] for name in named]
    return ["values of the linear layers", "WikiText-2", "C4"], lines


TABLES = {"values": values}


def main() -> None:
    """Pack, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--text", nargs="+", default=["boolq=boolq-held-out"])
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    print(heading())
    calibrated = {"calibration": args.calibration, "windows": 64, "sequence_length": 512}
    modes: dict[str, dict[str, Any]] = {
        "bfloat16": {"values": "bfloat16"},
        "bfloat16 archive": {"values": "bfloat16", "archive": True},
        "int8 nearest": {"values": "int8", "embeddings": "keep"},
        "int8 calibrated": {"values": "int8", "embeddings": "keep", **calibrated},
        "int8 calibrated, embeddings": {"values": "int8", "embeddings": "int8", **calibrated},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name.replace(" ", "-") for name in modes}
        for name, options in modes.items():
            secateur.compress(args.pruned, output=folders[name], **options)
        tokenizer = load_tokenizer(args.pruned)
        bf16, small = folders["bfloat16"], folders["int8 calibrated, embeddings"]
        row = {
            "same_texts_of_10_float32": same_texts(bf16, tokenizer, torch.float32),
            "same_texts_of_10_bfloat16": same_texts(bf16, tokenizer, torch.bfloat16),
            "perplexity": {
                text: judged(folders, file, args.windows)
                for text, file in (x.split("=", 1) for x in args.text)
            },
            "file_bytes": {
                name: sum(file.stat().st_size for file in shard_files(folder))
                for name, folder in folders.items()
            },
            "memory_bytes": {
                "bfloat16 packed": memory(bf16, "packed"),
                "int8 calibrated, embeddings": memory(small, "packed"),
                "bfloat16 dense": memory(bf16, "dense"),
            },
        }
    print(json.dumps(row, indent=2))
    keep("packing", {"protocol": __doc__, "windows": args.windows}, [row])


if __name__ == "__main__":
    main()
