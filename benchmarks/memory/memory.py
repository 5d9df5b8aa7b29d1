"""Planned and measured memory of pruning Llama-shaped checkpoints with random weights.

    python -m benchmarks.memory.memory [--shape 1b] [--layers 16 24] [--method wanda] [--samples 32]
    python -m benchmarks.memory.memory --shape 7b --layers 32 --activations disk --samples 2

The last needs 28 GB of disk.

Weights in bfloat16, windows of 512 random tokens. Each run is a process of its own, so that its
peak is its own; the peak is the operating system's high-water mark of resident memory. Rows say
the seconds of each layer, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from safetensors.torch import save_file

MEASURES = ("src/secateur/engine/stream", "src/secateur/engine/prune")
MINUTES = 14

SHAPES = {"1b": (2048, 5632, 8), "7b": (4096, 11008, 32), "tiny": (64, 96, 8)}
"""Hidden width, FFN width and KV heads: TinyLlama's with twice its KV heads, Llama-2-7B's, and a
shape to try a benchmark with."""


def random_checkpoint(folder: Path, shape: str, layers: int) -> int:
    """Write a random Llama checkpoint, a shard per layer; returns its size in bytes."""
    from transformers import LlamaConfig

    h, f, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=h, intermediate_size=f, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=kv_heads, tie_word_embeddings=False,
        max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir()
    config.save_pretrained(folder)
    weight = random_weight()

    def outer() -> dict[str, torch.Tensor]:
        return {
            "model.embed_tokens.weight": weight(32000, h),
            "lm_head.weight": weight(32000, h),
            "model.norm.weight": torch.ones(h).bfloat16(),
        }

    def layer(i: int) -> dict[str, torch.Tensor]:
        p, kv = f"model.layers.{i}.", kv_heads * h // 32
        return {
            p + "self_attn.q_proj.weight": weight(h, h),
            p + "self_attn.k_proj.weight": weight(kv, h),
            p + "self_attn.v_proj.weight": weight(kv, h),
            p + "self_attn.o_proj.weight": weight(h, h),
            p + "mlp.gate_proj.weight": weight(f, h),
            p + "mlp.up_proj.weight": weight(f, h),
            p + "mlp.down_proj.weight": weight(h, f),
            p + "input_layernorm.weight": torch.ones(h).bfloat16(),
            p + "post_attention_layernorm.weight": torch.ones(h).bfloat16(),
        }

    return save_shards(folder, layers + 1, lambda n: layer(n - 1) if n else outer())


def random_weight() -> Callable[..., torch.Tensor]:
    """A function from a shape to normal weights, always the same in the same order."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def save_shards(folder: Path, count: int, shard: Callable[[int], dict[str, torch.Tensor]]) -> int:
    """Write a checkpoint, a shard at a time; returns its size in bytes."""
    size, index = 0, {}
    for number in range(count):
        tensors = shard(number)
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return size


def measure(layers: int, args: argparse.Namespace, scratch: Path) -> dict:
    """Prune one checkpoint in a process of its own."""
    source, output = scratch / f"source-{layers}", scratch / f"pruned-{layers}"
    size = random_checkpoint(source, args.shape, layers)
    windows = scratch / "windows.safetensors"
    ids = torch.randint(0, 32000, (args.samples, 512), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, windows)
    command = [
        sys.executable, "-m", "secateur", "prune", str(source), "--output", str(output),
        "--method", args.method, "--sparsity", "0.5", "--calibration", str(windows),
        "--windows", str(args.samples), "--sequence-length", "512",
        "--activations", args.activations, "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    manifest = json.loads(done.stdout)
    lines = (output / "secateur" / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    of_layers = {r["layer"]: r["seconds"] for r in map(json.loads, lines)}
    planned = manifest["plan"]["peak_bytes"]
    measured = manifest["cost"]["peak_resident_bytes"]
    return {
        "layers": layers,
        "checkpoint_bytes": size,
        "limit_bytes": size // 4 + 2**30,
        "planned_bytes": planned,
        "measured_bytes": measured,
        "planned_over_measured": planned / measured,
        "seconds": manifest["cost"]["seconds"],
        "seconds_of_layers": [round(of_layers[n], 1) for n in sorted(of_layers)],
        "plan": manifest["plan"],
    }


def peaks(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The sizes of checkpoints, and the memory and time that pruning them took."""
    lines = []
    for row in rows:
        seconds = sorted(row["seconds_of_layers"])
        sizes = (f"{row[name] / 2**30:.2f} GiB" for name in ("checkpoint_bytes", "measured_bytes"))
        lines.append([str(row["layers"]), *sizes, f"{seconds[0]:.0f} to {seconds[-1]:.0f}"])
    return ["layers", "checkpoint", "peak memory", "seconds of a layer"], lines


TABLES = {"peaks": peaks}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; kept out of RAM")
    parser.add_argument("--layers", type=int, nargs="*", default=[16, 24])
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--activations", default="memory")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    print(heading())
    rows = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            rows.append(measure(layers, args, Path(scratch)))
        print({k: v for k, v in rows[-1].items() if k != "plan"}, flush=True)
    protocol = {"samples": args.samples, "sequence_length": 512, "method": args.method,
                "activations": args.activations}  # fmt: skip
    name = f"memory-{args.shape}-{args.method}-{args.activations}"
    print(f"written to {keep(name, protocol, rows)}")
    print(markdown(*peaks(rows)))


if __name__ == "__main__":
    main()
