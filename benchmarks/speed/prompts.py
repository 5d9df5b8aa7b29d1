"""Prompts of 64 and 512 tokens: packed, dense, torch and llama.cpp in turns.

    python -m benchmarks.speed.prompts --work DIR --pruned SMOLLM2 [--prompts 64 512] [--rounds 7]

The models of `benchmarks/speed/decode.py`: TinyLlama's shape with random weights, half of the decoder's
zero, and SmolLM2-135M pruned to 50 % (`--pruned`), each packed with bfloat16 and with int8 values,
next to the same weights with their zeros. llama.cpp runs Q8_0 of the same weights. Of a round, only
the time to the first token counts: the prompt, and the logits of its last token. Medians over
rounds; contenders take turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.speed.decode import SHAPE, packed, random_tensors, write_checkpoint
from benchmarks.speed.gguf_writing import write_gguf
from safetensors import safe_open

import secateur
from secateur.runtime.kernels.library import kernel_info

MEASURES = ("src/secateur/runtime",)

BLOCK_COLUMNS = 32  # of Q8_0
BESIDE = {"int8": ("dense int8",), "bfloat16": ("dense bf16", "torch bf16")}


def random_model(work: Path) -> tuple[Path, Path]:
    """A folder and its Q8_0 file."""
    dense, file = work / "random", work / "random-q8_0.gguf"
    if not file.exists():
        shutil.rmtree(dense, ignore_errors=True)
        tensors = random_tensors(SHAPE)
        write_checkpoint(SHAPE, tensors, dense)
        write_gguf(SHAPE, tensors, file)
    return dense, file


def smollm2(work: Path, pruned: Path) -> tuple[Path, Path]:
    """The pruned folder, and its weights as Q8_0."""
    file = work / "smollm2-q8_0.gguf"
    if not file.exists():
        config = json.loads((pruned / "config.json").read_text(encoding="utf-8"))
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        with safe_open(pruned / "model.safetensors", "pt") as stored:
            names = [name for name in stored.keys() if name != "lm_head.weight"]  # noqa: SIM118
            tensors = {name.removesuffix(".weight"): stored.get_tensor(name) for name in names}
        assert all(t.ndim == 1 or t.shape[1] % BLOCK_COLUMNS == 0 for t in tensors.values())
        write_gguf(config, tensors, file)
    return pruned, file


def rows_of(name: str, folder: Path, file: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds to the first token of all contenders, for each length of prompt."""
    rows: list[dict[str, Any]] = []
    for tokens in args.prompts:
        for values in args.values:
            report = secateur.bench(
                packed(folder, values, args.work / f"{folder.name}-{values}"),
                contenders=("packed", *BESIDE[values]),
                gguf=[file],
                prompt_tokens=tokens,
                new_tokens=2,
                rounds=args.rounds,
                seconds=args.seconds,
            )
            for row in report.to_json()["contenders"]:
                print(name, tokens, values, row, flush=True)
                label = f"packed {values}" if row["contender"] == "packed" else row["contender"]
                rows.append({"model": name, "prompt_tokens": tokens, "values": values})
                rows[-1] |= {**row, "contender": label}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append(
                [row["model"], row["prompt_tokens"], row["contender"], row["failure"], "", "", ""]
            )
            continue
        keys = ("model", "prompt_tokens", "values")
        same = [r for r in rows if all(r[k] == row[k] for k in keys) and "failure" not in r]
        rate = row["prompt_tokens_per_second"]
        first = f"{1e3 * row['first_token_seconds']:.0f} ms"
        cells = [row["model"], row["prompt_tokens"], row["contender"], first, f"{rate:.0f}"]
        for name in (".gguf", "torch bf16"):
            theirs = [r for r in same if r["contender"].endswith(name)]
            there = [f"{rate / r['prompt_tokens_per_second']:.2f}" for r in theirs]
            cells.append(there[0] if there else "")
        lines.append(cells)
    columns = ["model", "prompt", "", "first token", "tokens/s", "× llama.cpp Q8_0", "× torch"]
    return markdown(columns, [[str(cell) for cell in line] for line in lines])


def main() -> None:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, kept")
    parser.add_argument("--pruned", type=Path, help="SmolLM2-135M pruned to 50 %%")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--values", nargs="+", default=["int8", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--parts", nargs="+", default=["random", "smollm2"])
    parser.add_argument("--name", default="prompts")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(heading(), "tier", kernel_info().tier, flush=True)
    rows: list[dict[str, Any]] = []
    if "random" in args.parts:
        rows += rows_of("1.1 B, 50 %", *random_model(args.work), args)
    if "smollm2" in args.parts:
        rows += rows_of("SmolLM2-135M, 50 %", *smollm2(args.work, args.pruned), args)
    protocol = {"protocol": __doc__, "rounds": args.rounds, "tier": kernel_info().tier}
    keep(args.name, {**protocol, "torch_threads": torch.get_num_threads()}, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
