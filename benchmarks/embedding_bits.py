"""What embedding and head lose with fewer bits, what they take, and how fast a model decodes.

    python benchmarks/embedding_bits.py MODEL --text FILE --calibration FILE [--windows 8]

MODEL (SmolLM2-135M, whose one matrix is both) is stored with linears in bfloat16, and embeddings in
bfloat16, in int8, and in int4 with groups of 32, 64 and 128, rounded to the nearest value or with
16 windows of the calibration text; and with linears in int4, all in groups of 64 and with the text.

Loss and mean KL divergence of the next token from MODEL's own prediction, over windows of 512
tokens, computed in float32 by the kernels, so activations that meet integers are rounded. `speed`
is in tokens a second, in bfloat16 after a prompt of 64 tokens, of one sequence: all folders are in
one process and take turns, and the fastest of many short runs counts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import secateur
from hardware import heading, keep, markdown
from secateur.runtime.decode import Decoder
from secateur.timing import alternate, seconds_of

LENGTH, PROMPT, STEPS, TURNS = 512, 64, 8, 40
GROUPS = (32, 64, 128)
STORED = [
    ("bfloat16", "auto", None, False),
    ("bfloat16", "int8", None, False),
    *(("bfloat16", "int4", group, text) for text in (False, True) for group in GROUPS),
    *(("int4", embeddings, 64, True) for embeddings in ("auto", "int8", "int4")),
]
"""Values of linears and embeddings, groups, and whether both are rounded with calibration text."""


def compressed(model: Path, folder: Path, how: tuple[Any, ...], text: Path) -> None:
    """Make a folder."""
    linears, embeddings, group, calibrated = how
    options: dict[str, Any] = {"values": linears, "embeddings": embeddings, "group_size": group}
    if calibrated:
        options |= {"calibration": text, "windows": 16, "sequence_length": LENGTH}
    secateur.compress(model, output=folder, **options)


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


def speeds(folders: list[Path], prompt: Tensor) -> list[float]:
    """Tokens a second of each folder."""
    decoders = [Decoder(secateur.load(folder), PROMPT + STEPS) for folder in folders]
    for decoder in decoders:
        decoder.prefill(prompt)

    def some_tokens(decoder: Decoder) -> float:
        decoder.slots.rewind(0, PROMPT)
        return seconds_of(lambda: [decoder.step(int(token)) for token in prompt[:STEPS]])

    return [STEPS / least for least in alternate(decoders, some_tokens, min, turns=TURNS)]


def main() -> None:
    """Store, judge, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="keeps the folders for the next call")
    parser.add_argument("--only-time", action="store_true", help="judge nothing")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: args.windows * LENGTH].view(args.windows, LENGTH)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch, own = args.scratch or Path(temporary), list[Tensor]()
        dense = (0.0, 0.0) if args.only_time else judged(args.model, windows, own)
        folders = [scratch / "-".join(map(str, how)) for how in STORED]
        for how, folder in zip(STORED, folders, strict=True):
            row = dict(zip(("linears", "embeddings", "group", "calibrated"), how, strict=True))
            if not folder.exists():
                compressed(args.model, folder, how, args.calibration)
            row["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            if not args.only_time:
                loss, divergence = judged(folder, windows, own)
                row |= {"loss": loss - dense[0], "divergence": divergence}
            rows.append(row)
            print(row, flush=True)
        for row, speed in zip(rows, speeds(folders, ids[:PROMPT]), strict=True):
            row["speed"] = speed
    protocol = {"protocol": __doc__, "windows": args.windows}
    keep("embedding-bits", protocol, rows)
    print(heading())
    print(markdown([*rows[0]], [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
