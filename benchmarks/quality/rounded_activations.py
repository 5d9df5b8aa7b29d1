"""What int8 loses by rounding activations, for numbers of columns that share a scale.

    python -m benchmarks.quality.rounded_activations MODEL --text FILE [--windows 8]

The linears of MODEL are rounded to int8 (`secateur compress`, each weight to the nearest), and both
models compute in float32, so only weights and inputs of linears differ. Mean KL divergence of the
next token from MODEL's own prediction, over windows of 512 tokens. `64, spread` is how kernels
share a scale beside int8, `64` how they do beside int4.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

import secateur
from secateur.quantization.activations import round_activations

MEASURES = ("src/secateur/quantization/activations.py",)

LENGTH = 512
SHARED = (256, 128, 64, 32)


def rounded(x: Tensor, columns: int) -> Tensor:
    """x with one scale of int8 for so many consecutive columns."""
    shares = functional.pad(x, (0, -x.shape[-1] % columns)).unflatten(-1, (-1, columns))
    scale = shares.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((shares / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "not rounded": lambda x: x,
    **{str(n): lambda x, n=n: rounded(x, n) for n in SHARED},  # type: ignore[misc]
    "64, spread": lambda x: round_activations(x, "spread"),
}


def log_probabilities(model: Any, window: Tensor, way: Callable[[Tensor], Tensor]) -> Tensor:
    """The predictions of a model whose linears of the decoder round their inputs."""
    linears = [x for x in model.model.layers.modules() if isinstance(x, nn.Linear)]
    hooks = [x.register_forward_pre_hook(lambda _, given: (way(given[0]),)) for x in linears]
    found: Tensor = model(input_ids=window[None]).logits[0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return found


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The divergence by how many columns share a scale."""
    lines = [[row["columns"], f"{row['divergence']:.4f}"] for row in rows]
    return ["columns that share a scale", "KL divergence"], lines


TABLES = {"columns": columns}


def main() -> None:
    """Round, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: args.windows * LENGTH].view(args.windows, LENGTH)
    dense = secateur.load(args.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = Path(scratch) / "int8"
        secateur.compress(args.model, values="int8", embeddings="keep", output=folder)
        model = secateur.load(Path(scratch) / "int8", dtype=torch.float32, expand=True)
        divergence = dict.fromkeys(WAYS, 0.0)
        for window in windows:
            expected = log_probabilities(dense, window, WAYS["not rounded"])
            for name, way in WAYS.items():
                found = log_probabilities(model, window, way)
                own = (expected.exp() * (expected - found)).sum(-1).mean()
                divergence[name] += float(own) / len(windows)
    rows = [{"columns": name, "divergence": value} for name, value in divergence.items()]
    keep("rounded-activations", {"protocol": __doc__, "windows": args.windows}, rows)
    print(heading())
    print(
        markdown(
            ["columns that share a scale", "KL"], [[n, f"{x:.4f}"] for n, x in divergence.items()]
        )
    )


if __name__ == "__main__":
    main()
