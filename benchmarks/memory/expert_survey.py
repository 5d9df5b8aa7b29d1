"""Memory and time of a survey of experts, for few and for many decoder layers.

    python -m benchmarks.memory.expert_survey [--layers 4 32] [--work DIR]

Random checkpoints in Qwen3-MoE's form: bfloat16, 64 experts of 256 neurons on 512 channels, eight
for a token. A quarter of the experts goes by `divergence`, and nothing is tuned. Each cut is a
process of its own, on one thread. Its peak is the operating system's high-water mark of resident
memory; its time is that of the processor, start and writing included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.memory.memory import random_weight, save_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

MEASURES = ("src/secateur/engine/search", "src/secateur/models/experts.py")
MINUTES = 4

WINDOWS, LENGTH, TOKENS = 16, 256, 2048
HIDDEN, NEURONS, EXPERTS, CHOSEN, HEADS, KV_HEADS = 512, 256, 64, 8, 8, 2


def random_mixture(folder: Path, layers: int) -> tuple[int, int]:
    """Write a random mixture, a shard for each layer; returns its bytes and those of a layer."""
    config = Qwen3MoeConfig(
        vocab_size=TOKENS, hidden_size=HIDDEN, moe_intermediate_size=NEURONS,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        norm_topk_prob=True, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    folder.mkdir()
    config.save_pretrained(folder)
    weight, one = random_weight(), torch.ones(HIDDEN).bfloat16()
    kv = KV_HEADS * HIDDEN // HEADS

    def layer(number: int) -> dict[str, Tensor]:
        found = {
            "self_attn.q_proj.weight": weight(HIDDEN, HIDDEN),
            "self_attn.k_proj.weight": weight(kv, HIDDEN),
            "self_attn.v_proj.weight": weight(kv, HIDDEN),
            "self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
            "self_attn.q_norm.weight": one[: HIDDEN // HEADS].clone(),
            "self_attn.k_norm.weight": one[: HIDDEN // HEADS].clone(),
            "input_layernorm.weight": one.clone(),
            "post_attention_layernorm.weight": one.clone(),
            "mlp.gate.weight": weight(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (HIDDEN, NEURONS) if name == "down_proj" else (NEURONS, HIDDEN)
                found[f"mlp.experts.{expert}.{name}.weight"] = weight(*shape)
        return {f"model.layers.{number}.{name}": x for name, x in found.items()}

    outer = {
        "model.embed_tokens.weight": weight(TOKENS, HIDDEN),
        "lm_head.weight": weight(TOKENS, HIDDEN),
        "model.norm.weight": one,
    }
    whole = save_shards(folder, layers + 1, lambda n: layer(n - 1) if n else outer)
    return whole, (whole - sum(x.nbytes for x in outer.values())) // layers


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(layers: int, scratch: Path) -> dict[str, Any]:
    """Cut one checkpoint in a process of its own."""
    source, windows = scratch / "source", scratch / "windows.safetensors"
    whole, layer = random_mixture(source, layers)
    random = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(TOKENS, (WINDOWS, LENGTH), generator=random)}, windows)
    command = [
        sys.executable, "-m", "secateur", "structure", str(source), "--experts", "0.75",
        "--experts-by", "divergence", "--effort", "fast", "--calibration", str(windows),
        "--windows", str(WINDOWS), "--sequence-length", str(LENGTH),
        "--output", str(scratch / "cut"), "--json",
    ]  # fmt: skip
    before = processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost = json.loads(done.stdout)["cost"]
    return {
        "layers": layers, "checkpoint_bytes": whole, "layer_bytes": layer,
        "peak_bytes": cost["peak_resident_bytes"], "seconds": cost["seconds"],
        "processor_seconds": processor_seconds() - before,
    }  # fmt: skip


def peaks(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The sizes of the checkpoints, and the memory and the time that cuts of them took."""
    sizes = ("checkpoint_bytes", "layer_bytes", "peak_bytes")
    columns = ["layers", "checkpoint", "one layer", "peak memory", "seconds of a core"]
    return [*columns, "of them for a layer"], [
        [
            str(row["layers"]), *(f"{row[name] / 2**20:.0f} MiB" for name in sizes),
            f"{row['processor_seconds']:.0f}", f"{row['processor_seconds'] / row['layers']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip


TABLES = {"peaks": peaks}


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 32])
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; kept out of RAM")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    protocol = {"windows": WINDOWS, "sequence_length": LENGTH, "experts": EXPERTS,
                "chosen": CHOSEN, "hidden": HIDDEN, "neurons": NEURONS, "kept": 0.75}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            rows.append(measure(layers, Path(scratch)))
        print(rows[-1], flush=True)
        keep("expert-survey", protocol, rows)
    print(markdown(*peaks(rows)))


if __name__ == "__main__":
    main()
