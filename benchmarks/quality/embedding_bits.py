"""What embedding and head lose with fewer bits, what they take, and how fast a model decodes.

    python -m benchmarks.quality.embedding_bits MODEL --text FILE --calibration FILE [--windows 8]

MODEL (SmolLM2-135M, whose one matrix is both) is stored with linears in bfloat16, and embeddings in
bfloat16, in int8, and in int4 with groups of 32, 64 and 128, rounded to the nearest value or with
16 windows of the calibration text; and with linears in int4, all in groups of 64 and with the text.

Loss and mean KL divergence of the next token from MODEL's own prediction, over windows of 512
tokens, computed in float32 by the kernels, so activations that meet integers are rounded.
`token_seconds` is the fastest single token of one sequence after a prompt of 64 tokens, in
bfloat16, with linears in int4: the folders are in one process and take turns, some tokens at a
time. The machine was busy, and only the fastest of several hundred tokens says what one takes.

The other rows of int4 linears have the linears of the one with int4 embeddings. Every finished row
is kept in `results/embedding-bits.json` at once, and skipped when it is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, keep, markdown
from benchmarks.stored import known_rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import secateur
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.decode import Decoder
from secateur.timing import alternate, seconds_of

MEASURES = ("src/secateur/quantization", "src/secateur/runtime/packed.py")
PROOF = ("llama/int8", "llama/int4", "llama/embeddings")
MINUTES = 40

LENGTH, PROMPT, STEPS, TURNS = 512, 64, 3, 144
GROUPS = (32, 64, 128)
STORED = [
    ("bfloat16", "keep", None, False),
    ("bfloat16", "int8", None, False),
    *(("bfloat16", "int4", group, text) for text in (False, True) for group in GROUPS),
    *(("int4", embeddings, 64, True) for embeddings in ("keep", "int8", "int4")),
]
"""Values of linears and embeddings, groups, and whether both are rounded with calibration text."""


def compressed(args: argparse.Namespace, scratch: Path, how: tuple[Any, ...]) -> Path:
    """A folder, made unless it is there."""
    linears, embeddings, group, calibrated = how
    folder = folder_of(scratch, how)
    options: dict[str, Any] = {"values": linears, "embeddings": embeddings, "group_size": group}
    if folder.exists():
        return folder
    if linears == "int4" and embeddings != "int4":
        source = scratch / "int4"
        if not source.exists():
            rounded = compressed(args, scratch, ("int4", "int4", group, True))
            with_own_embedding(args.model, rounded, source)
        secateur.compress(source, output=folder, **options)
        return folder
    if calibrated:
        options |= {"calibration": args.calibration, "windows": 16, "sequence_length": LENGTH}
    secateur.compress(args.model, output=folder, **options)
    return folder


def folder_of(scratch: Path, how: tuple[Any, ...]) -> Path:
    """The folder of a way to store the model."""
    return scratch / "-".join(map(str, how))


def with_own_embedding(model: Path, rounded: Path, folder: Path) -> None:
    """The rounded linears of a packed folder, dense, and the embedding of MODEL."""
    secateur.decompress(rounded, output=folder)
    file, name = folder / "model.safetensors", "model.embed_tokens.weight"
    embedding = CheckpointReader(model).read(name).bfloat16()
    save_file({**load_file(file), name: embedding}, file, {"format": "pt"})


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


def fastest_tokens(folders: list[Path], prompt: Tensor) -> list[float]:
    """Seconds of the fastest token of each folder."""
    decoders = [Decoder(secateur.load(folder), PROMPT + STEPS) for folder in folders]
    for decoder in decoders:
        decoder.prefill(prompt)

    def some_tokens(decoder: Decoder) -> float:
        decoder.slots.rewind(0, PROMPT)
        return min(seconds_of(lambda: decoder.step(5)) for _ in range(STEPS))

    return alternate(decoders, some_tokens, min, turns=TURNS)


def bits(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Loss and divergence by how embedding and head are stored, linears in bfloat16."""
    of = {(r["embeddings"], r["group"], r["calibrated"]): r for r in rows
          if r["linears"] == "bfloat16"}  # fmt: skip
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
    """Store, judge, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="keeps the folders for the next call")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: args.windows * LENGTH].view(args.windows, LENGTH)
    protocol = {"protocol": __doc__, "windows": args.windows}
    own: list[Tensor] = []
    dense = judged(args.model, windows, own)[0]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        for how in reversed(STORED):
            named = dict(zip(("linears", "embeddings", "group", "calibrated"), how, strict=True))
            if any(row.items() >= named.items() for row in known_rows("embedding-bits")):
                continue
            folder = compressed(args, scratch, how)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            loss, divergence = judged(folder, windows, own)
            measured = {"bytes": size, "loss": loss - dense, "divergence": divergence}
            add("embedding-bits", protocol, {**named, **measured})
            print({**named, **measured}, flush=True)
        timed = [how for how in STORED if how[0] == "int4"]
        found = fastest_tokens([compressed(args, scratch, how) for how in timed], ids[:PROMPT])
    rows = known_rows("embedding-bits")
    for how, seconds in zip(timed, found, strict=True):
        row = next(row for row in rows if tuple(row.values())[:4] == how)
        row["token_seconds"] = seconds
    keep("embedding-bits", protocol, rows)
    print(heading())
    columns = [*named, "bytes", "loss", "divergence", "token_seconds"]
    print(markdown(columns, [[str(row.get(name, "")) for name in columns] for row in rows]))


if __name__ == "__main__":
    main()
