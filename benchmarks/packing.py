"""What packing changes of a pruned model: nothing in bfloat16, next to nothing in int8.

    python benchmarks/packing.py PRUNED [--text FILE] [--windows 24]

1. Greedy text, ten prompts of 64 tokens each: the pruned model in bfloat16 values against the same
   packed, both computing in float32 (`secateur.load(dtype=float32)`; one call for each token), so
   that what is compared is packing, and not how a bfloat16 sum happens to be rounded. How many
   texts are the same when both compute in bfloat16 is told beside it.
2. Perplexity, windows of 2048 tokens: bfloat16 values, and int8 values (embedding and head too),
   the latter with float activations (many tokens at once) and with activations rounded to int8 in
   blocks of 256 (as one token at a time is computed).
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

import secateur
from hardware import heading, keep
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.decode import Decoder
from secateur.runtime.linear import PackedLinear

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
            found.append(list(decoder.continued(ids[0], NEW_TOKENS)))
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
        way: sum(a == b for a, b in zip(dense, texts(model, tokenizer, one_call=one), strict=True))
        for way, one in (("one call a token", True), ("packed in transformers", False))
    }


def perplexity(folder: Path, text: str, windows: int, *, bytes_only: bool = False) -> float:
    """Of a packed folder; `bytes_only` lets kernels compute everything, eight tokens at a time."""
    model = secateur.load(folder)
    if bytes_only:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.kernel_up_to = 2**31
    tokenizer = load_tokenizer(folder)
    judged = secateur.evaluate(
        model, text=text, tokenizer=tokenizer, sequence_length=2048, max_windows=windows
    )
    return float(judged.perplexity)


def memory(folder: Path, how: str) -> int:
    """Bytes that loading adds to a process."""
    command = [sys.executable, "-c", MEMORY, str(folder), how]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(told.splitlines()[-1]))


def main() -> None:
    """Pack, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--text", default="boolq-held-out")
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        sizes = {}
        for values, options in (
            ("bfloat16", {}),
            ("int8", {"embeddings": "int8"}),
            ("archive", {"archive": True}),
        ):
            folders[values] = Path(scratch) / values
            wanted = "bfloat16" if values == "archive" else values
            secateur.compress(args.pruned, values=wanted, output=folders[values], **options)
            sizes[values] = (folders[values] / "model.safetensors").stat().st_size
        tokenizer = load_tokenizer(args.pruned)
        bf16, int8 = folders["bfloat16"], folders["int8"]
        row = {
            "same_texts_of_10_float32": same_texts(bf16, tokenizer, torch.float32),
            "same_texts_of_10_bfloat16": same_texts(bf16, tokenizer, torch.bfloat16),
            "perplexity_bfloat16": perplexity(bf16, args.text, args.windows),
            "perplexity_int8": perplexity(int8, args.text, args.windows),
            "perplexity_int8_activations_too": perplexity(
                int8, args.text, args.windows, bytes_only=True
            ),
            "file_bytes": sizes,
            "memory_bytes": {
                "bfloat16 packed": memory(bf16, "packed"),
                "int8 packed": memory(int8, "packed"),
                "bfloat16 dense": memory(bf16, "dense"),
            },
        }
    print(json.dumps(row, indent=2))
    keep("packing", {"protocol": __doc__, "windows": args.windows}, [row])


if __name__ == "__main__":
    main()
