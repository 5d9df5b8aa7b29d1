"""What embedding and head lose with fewer bits, what they take, and how fast a model decodes.

    python -m benchmarks.quality.embedding_bits MODEL --text FILE --calibration FILE [--windows 8]
    python -m benchmarks.quality.embedding_bits MODEL --text FILE --pairs [--windows 16]

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

`--pairs` asks whether int8 embeddings cost anything beside linears in int8 and in int4 (rounded to
the nearest value): the loss with them minus the loss with bfloat16 embeddings, window by window,
the mean and its standard error. Windows are of 1024 tokens of the text for MODEL, and 128 of 256
letters of held-out files for the small Llama of `tests/support/trained.py`. Both run in bfloat16 as users
run them. The rows are in `results/embedding-pairs.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, keep, markdown
from benchmarks.stored import known_rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

import secateur
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.decode import Decoder
from secateur.timing import alternate, seconds_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/support"))
from trained import save_trained, source_ids

MEASURES = ("src/secateur/quantization", "src/secateur/runtime/packed.py")

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


@torch.inference_mode()
def losses(folder: Path, windows: Tensor) -> Tensor:
    """The loss of every window [windows], as the model runs."""
    model = secateur.load(folder)
    found = (model(input_ids=w[None]).logits[0, :-1].float() for w in windows)
    pairs = zip(found, windows, strict=True)
    return torch.stack([functional.cross_entropy(x, w[1:]) for x, w in pairs]).double()


def compare_pairs(args: argparse.Namespace, scratch: Path) -> None:
    """What int8 embeddings cost beside linears of integers, in both models."""
    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(encoding="utf-8"))
    text = torch.tensor(ids["input_ids"])[: args.windows * 1024].view(-1, 1024)
    letters = source_ids(held_out=True)[: 128 * 256].view(-1, 256)
    small = save_trained(scratch / "trained")
    for name, model, windows in (("trained", small, letters), ("smollm2", args.model, text)):
        for linears in ("int8", "int4"):
            judged = {}
            for embeddings in ("keep", "int8"):
                folder = scratch / f"{name}-{linears}-{embeddings}"
                made = secateur.compress(
                    model, output=folder, values=linears, embeddings=embeddings
                )
                judged[embeddings] = losses(folder, windows), made.file_bytes
            (kept, larger), (rounded, smaller) = judged.values()
            paired = rounded - kept
            row = {
                "model": name, "linears": linears, "windows": len(windows),
                "tokens": windows.shape[1], "loss": float(kept.mean()),
                "difference": float(paired.mean()),
                "standard_error": float(paired.std()) / len(paired) ** 0.5,
                "bytes_kept": larger, "bytes_int8": smaller,
            }  # fmt: skip
            add("embedding-pairs", {"protocol": __doc__}, row)
            print(row, flush=True)


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


def pairs(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What int8 embeddings add to the loss, beside linears of integers."""
    lines = [
        [row["model"], row["linears"], f"{row['difference']:+.4f} ± {row['standard_error']:.4f}",
         f"{row['bytes_kept'] / 1e6:.2f} → {row['bytes_int8'] / 1e6:.2f} MB"]
        for row in rows
    ]  # fmt: skip
    return ["model", "beside", "loss", "files"], lines


TABLES = {"bits": bits, "pairs": pairs}


def main() -> None:
    """Store, judge, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="keeps the folders for the next call")
    args = parser.parse_args()
    if args.pairs:
        with tempfile.TemporaryDirectory() as temporary:
            compare_pairs(args, Path(temporary))
        return
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
