"""What embedding and head lose with fewer bits, and what they take.

    python -m benchmarks.quality.embedding_bits MODEL --text FILE --calibration FILE [--windows 8]

MODEL (SmolLM2-135M, whose one matrix is both) is stored with its linear layers in bfloat16, and the
matrix in bfloat16, in int8, and in int4 with groups of 32, 64 and 128, rounded to the nearest value
or with 16 windows of the calibration text.

Loss and mean KL divergence of the next token from MODEL's own prediction, over windows of 512
tokens, computed in float32 by the kernels, so activations that meet integers are rounded. Every
finished row is kept in `results/embedding-bits.json` at once, and skipped when it is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading
from benchmarks.stored import known_rows
from torch import Tensor
from transformers import AutoTokenizer

import secateur

MEASURES = ("src/secateur/quantization", "src/secateur/runtime/packed.py")
PROOF = ("llama/int8", "llama/int4", "llama/embeddings")
MINUTES = 12

LENGTH = 512
GROUPS = (32, 64, 128)
STORED = [
    ("keep", None, False),
    ("int8", None, False),
    *(("int4", group, text) for text in (False, True) for group in GROUPS),
]
"""Values of embedding and head, groups, and whether they are rounded with calibration text."""


def compressed(args: argparse.Namespace, folder: Path, how: tuple[Any, ...]) -> Path:
    """The folder of a way to store the model."""
    embeddings, group, calibrated = how
    text = {"calibration": args.calibration, "windows": 16, "sequence_length": LENGTH}
    secateur.compress(
        args.model, output=folder, values="bfloat16", embeddings=embeddings, group_size=group,
        **(text if calibrated else {}),
    )  # fmt: skip
    return folder


@torch.inference_mode()
def judged(folder: Path, windows: Tensor, own: list[Tensor]) -> tuple[float, float]:
    """Loss, and divergence from what MODEL predicts, which is added to `own` at first."""
    model = secateur.load(folder, dtype=torch.float32)
    loss = divergence = 0.0
    for number, window in enumerate(windows):
        found = model(input_ids=window[None]).logits[0].log_softmax(-1)
        if number == len(own):
            own.append(found.half())
        expected = own[number].float()
        divergence += float((expected.exp() * (expected - found)).sum(-1).mean())
        loss -= float(found[:-1].gather(1, window[1:, None]).mean())
    return loss / len(windows), divergence / len(windows)


def bits(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Loss and divergence by how embedding and head are stored."""
    of = {(r["embeddings"], r["group"], r["calibrated"]): r for r in rows}
    lines = []
    for embeddings, group in dict.fromkeys((name, group) for name, group, _ in of):
        row, text = of[embeddings, group, False], of.get((embeddings, group, True))
        name = {"keep": "bfloat16"}.get(embeddings, embeddings)
        name += f", groups of {group}" if group else ""
        cells = [f"{x['loss']:+.3f}, {x['divergence']:.3f}" if x else "" for x in (row, text)]
        lines.append([name, f"{row['bytes'] / 1e6:.1f}", *cells])
    columns = ["embedding and head", "MB of the model", "to the nearest: loss, KL"]
    return [*columns, "with text: loss, KL"], lines


TABLES = {"bits": bits}


def main() -> None:
    """Store and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: args.windows * LENGTH].view(args.windows, LENGTH)
    protocol = {"protocol": __doc__, "windows": args.windows}
    own: list[Tensor] = []
    dense = judged(args.model, windows, own)[0]
    print(heading())
    for how in STORED:
        named = dict(zip(("embeddings", "group", "calibrated"), how, strict=True))
        if any(row.items() >= named.items() for row in known_rows("embedding-bits")):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = compressed(args, Path(scratch) / "made", how)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            loss, divergence = judged(folder, windows, own)
        measured = {"bytes": size, "loss": loss - dense, "divergence": divergence}
        add("embedding-bits", protocol, {**named, **measured})
        print({**named, **measured}, flush=True)


if __name__ == "__main__":
    main()
