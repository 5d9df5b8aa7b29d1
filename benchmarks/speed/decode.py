"""Whole models at batch 1: packed, dense, torch and llama.cpp in turns.

    python -m benchmarks.speed.decode [--work DIR] [--rounds 7] [--parts random smollm2]

Random model: TinyLlama's shape, 1.1 billion parameters, random weights, half of those of the
decoder's linears zero (the same number in each row). It is packed with bfloat16 and with int8
values (embedding and head int8 too), and written as GGUF Q8_0 for llama.cpp. SmolLM2-135M: one
pruned to 50 % (`--pruned`), packed in the same two ways, and its own Q4_1 file in llama.cpp.

Each contender is a process; rounds go around among them (`secateur.evaluation.speed`), a prompt of
64 tokens and 32 new ones, medians over rounds. llama.cpp (xllamacpp) times itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.speed.gguf_writing import write_gguf
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import secateur
from secateur.models.hub import MODELS
from secateur.models.skeleton import quiet_transformers
from secateur.reporting.evaluate import BenchResult

MEASURES = ("src/secateur/runtime",)

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,  # llama.cpp takes no longer prompts
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a random model, by their names without `.weight`."""
    known = CONFIG_MAPPING[config["model_type"]](**config)
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(known)
    return {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters()}


def random_tensors(config: dict[str, Any], zeros: str = "50 %") -> dict[str, torch.Tensor]:
    """All of them; experts are stored fused.

    Args:
        config: as in `config.json`.
        zeros: of each row of the linears, `50 %`, `70 %` or `2:4`.
    """
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        weight = torch.randn(shape) * 0.02
        if ".layers." in name and not name.endswith(".gate"):  # no router
            among = weight.unflatten(-1, (-1, 4)) if zeros == "2:4" else weight
            share = 0.7 if zeros == "70 %" else 0.5
            rank = round(share * among.shape[-1])
            least = among.abs().kthvalue(rank, dim=-1, keepdim=True).values
            among[among.abs() <= least] = 0
        tensors[name] = weight.bfloat16()
    return tensors


def write_checkpoint(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path
) -> Path:
    """As transformers would."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    named = {f"{n}.weight" if t.ndim < 3 else n: t for n, t in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def packed(folder: Path, values: str, output: Path) -> Path:
    """The folder compressed."""
    if not output.exists():
        embeddings = "int8" if values == "int8" else "keep"
        secateur.compress(folder, values=values, embeddings=embeddings, output=output)
    return output


def measured(name: str, folder: Path, rounds: int, **options: Any) -> list[dict[str, Any]]:
    """All contenders of one folder, with its name."""
    report: BenchResult = secateur.bench(folder, rounds=rounds, **options)
    print(f"{name}: {report.verdict}", flush=True)
    return [
        {"model": name, "file_bytes": report.file_bytes, **row}
        for row in report.to_json()["contenders"]
    ]


def random_model(work: Path, rounds: int) -> list[dict[str, Any]]:
    """The rows of the random model."""
    dense, file = work / "random", work / "random-q8_0.gguf"
    if not file.exists():
        shutil.rmtree(dense, ignore_errors=True)
        tensors = random_tensors(SHAPE)
        write_checkpoint(SHAPE, tensors, dense)
        write_gguf(SHAPE, tensors, file)
        del tensors
    ours = ("packed", "dense bf16", "torch bf16")
    rows = measured(
        "1.1 B, 50 %, bf16",
        packed(dense, "bfloat16", work / "random-bf16"),
        rounds,
        contenders=ours,
    )
    ours = ("packed", "dense int8", "torch int8")
    return rows + measured(
        "1.1 B, 50 %, int8",
        packed(dense, "int8", work / "random-int8"),
        rounds,
        contenders=ours,
        gguf=[file],
    )


def smollm2(work: Path, pruned: Path, rounds: int) -> list[dict[str, Any]]:
    """The rows of SmolLM2."""
    file = MODELS["smollm2-135m"].fetch()
    rows = measured(
        "SmolLM2-135M, 50 %, bf16", packed(pruned, "bfloat16", work / "smol-bf16"), rounds
    )
    return rows + measured(
        "SmolLM2-135M, 50 %, int8",
        packed(pruned, "int8", work / "smol-int8"),
        rounds,
        contenders=("packed", "packed in transformers", "dense int8", "torch bf16"),
        gguf=[file],
    )


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    lines = []
    for row in rows:
        if "failure" in row:
            lines.append([row["model"], row["contender"], row["failure"], "", "", ""])
            continue
        own = next(r for r in rows if r["model"] == row["model"] and r["contender"] == "packed")
        lines.append(
            [
                row["model"],
                row["contender"],
                f"{row['tokens_per_second']:.1f}",
                f"{own['tokens_per_second'] / row['tokens_per_second']:.2f}",
                f"{1e3 * row['first_token_seconds']:.0f} ms",
                f"{row['resident_bytes'] / 2**20:.0f} MiB",
            ]
        )
    columns = ["model", "", "tokens/s", "packed is faster by", "first token", "memory"]
    return markdown(columns, lines)


def main() -> None:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the models, kept")
    parser.add_argument("--pruned", type=Path, help="SmolLM2-135M pruned to 50 %%")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["random", "smollm2"])
    parser.add_argument("--name", default="decode")
    args = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        rows = random_model(work, args.rounds) if "random" in args.parts else []
        if "smollm2" in args.parts:
            rows += smollm2(work, args.pruned, args.rounds)
    keep(args.name, {"protocol": __doc__, "rounds": args.rounds}, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
