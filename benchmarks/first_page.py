"""The first page's table: what zeros and rounding cost and bring, after everything is stored.

    python -m benchmarks.first_page --calibration c4.jsonl --text wiki.txt --work WORK \\
        [--parts make time judge score]

One model (SmolLM2-135M; its source is a 4-bit file), one machine, one protocol for every row:

- Calibration is 64 windows of 512 tokens (`random-crop`, seed 0) of one file, for pruning and for
  rounding.
- Perplexity is that of the stored files as they run: weights rounded, activations rounded by our
  kernels; non-overlapping windows of 2048 tokens, the loss over each window's own next tokens, the
  first windows of the text. llama.cpp's perplexity comes from its own logits, on the same windows.
- Tasks: the mean accuracy on WinoGrande, PIQA, OpenBookQA, ARC easy and challenge, the first 100 items of each,
  without examples; the stored files as they run. Its standard error is 2 points, so the table of
  the page leaves it out: see docs/common-claims.md.
- Tokens per second: batch 1, a prompt of 64 tokens, 32 new ones, each row in a process of its own,
  rounds interleaved, medians, nothing else on the machine. llama.cpp times itself.

Folders stay in WORK, and every finished number in `results/first-page.json`: a run goes on where
another one stopped.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.quality.local_tasks import write_tasks
from benchmarks.quality.presets import windows_file
from benchmarks.quality.tasks import FIVE
from benchmarks.stored import Rows, known_rows

import secateur
from secateur.calibration.documents import read_text
from secateur.evaluation.speed import take_turns
from secateur.models.cache import cache_folder
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer

MEASURES = (
    "src/secateur/engine",
    "src/secateur/sparsity",
    "src/secateur/quantization",
    "src/secateur/runtime",
)
MINUTES = 35

MODEL = "smollm2-135m"
INT8: dict[str, Any] = {"values": "int8", "embeddings": "int8"}
INT4: dict[str, Any] = {"values": "int4", "embeddings": "int8"}
STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "no zeros, bfloat16": (MODEL, {"values": "bfloat16"}),
    "no zeros, int8": (MODEL, INT8),
    "no zeros, int4": (MODEL, INT4),
    "balanced, int8": ("balanced", INT8),
    "balanced, int4": ("balanced", INT4),
}
GGUF = {"llama.cpp Q8_0": "q8_0", "llama.cpp Q4_0": "q4_0"}
TIMED = ("no zeros, int8", "no zeros, int4", "balanced, int8", "balanced, int4")
TORCH = "no zeros, bfloat16, torch"
PROMPT_TOKENS, NEW_TOKENS, ITEMS = 64, 32, 100


def store(args: argparse.Namespace, row: str, output: Path) -> None:
    """Prune, round and store what a row needs; integers with calibration."""
    source, values = STORED[row]
    folder = MODEL if source == MODEL else args.work / source
    if source != MODEL and not folder.exists():
        secateur.prune(
            MODEL, output=folder, sparsity=0.5, effort=source, calibration=args.calibration,
            windows=64, sequence_length=512, packing="random-crop", seed=0,
        )  # fmt: skip
    calibration: dict[str, Any] = {}
    if values["values"] in ("int8", "int4"):
        calibration = {"calibration": windows_file(args, 0, args.work)}
    secateur.compress(folder, output=output, resume=True, **values, **calibration)


def file_bytes(path: Path) -> int:
    """Of a GGUF file, or of the weights in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.glob("*.safetensors"))


def windows_of(text: str, count: int) -> torch.Tensor:
    """The first windows of a text, as `secateur.evaluate` cuts them."""
    ids = load_tokenizer(resolve(MODEL).folder)(read_text(text).text, add_special_tokens=False)
    return torch.tensor(ids["input_ids"][: count * 2048]).view(count, 2048)


def llama_cpp_loss(file: Path, windows: torch.Tensor) -> float:
    """Mean loss of next tokens by llama.cpp's own logits."""
    import numpy as np
    from llama_cpp_py_sync import Llama

    engine = Llama(str(file), n_ctx=windows.shape[1], n_threads=torch.get_num_threads())
    lib, ffi, words = engine._lib, engine._ffi, engine.n_vocab
    total = 0.0
    for window in windows:
        engine._clear_context_state()
        for start in range(0, len(window), 256):
            ids = window[start : start + 256]
            batch = lib.llama_batch_init(len(ids), 0, 1)
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids.tolist()):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            if lib.llama_decode(engine._ctx, batch):
                raise SystemExit(f"{file}: llama.cpp could not decode")
            lib.llama_batch_free(batch)
            nexts = window[start + 1 : start + 257]
            buffer = ffi.buffer(lib.llama_get_logits(engine._ctx), 4 * words * len(ids))
            logits = torch.from_numpy(np.frombuffer(buffer, dtype=np.float32).copy())
            logits = logits.view(len(ids), words)[: len(nexts)]
            total += torch.nn.functional.cross_entropy(logits, nexts, reduction="sum").item()
    engine.close()
    return total / (windows.numel() - len(windows))


class Table:
    """Finished numbers by row, kept after each one."""

    def __init__(self, protocol: dict[str, Any]) -> None:
        self.protocol = protocol
        self.rows = {r["row"]: r for r in known_rows("first-page", protocol)}

    def missing(self, row: str, number: str) -> bool:
        return number not in self.rows.get(row, {})

    def put(self, row: str, **numbers: Any) -> None:
        self.rows.setdefault(row, {"row": row}).update(numbers)
        keep("first-page", self.protocol, [*self.rows.values()])
        print(row, numbers, flush=True)


def make(args: argparse.Namespace, table: Table) -> None:
    """All folders and files."""
    for row in STORED:
        if table.missing(row, "file_bytes"):
            shutil.rmtree(args.work / row, ignore_errors=True)
            store(args, row, args.work / row)
            table.put(row, file_bytes=file_bytes(args.work / row))
    for row, type in GGUF.items():
        if table.missing(row, "file_bytes"):
            shutil.rmtree(args.work / row, ignore_errors=True)
            secateur.export(MODEL, output=args.work / row, to="gguf", type=type)
            table.put(row, file_bytes=file_bytes(gguf_of(args, row)))


def gguf_of(args: argparse.Namespace, row: str) -> Path:
    """The file that llama.cpp runs."""
    return next((args.work / row).glob("*.gguf"))


def time_rows(args: argparse.Namespace, table: Table) -> None:
    """Speed of all models, interleaved; anew where one is missing."""
    timed = [("torch bf16", args.work / "no zeros, bfloat16")]
    timed += [("packed", args.work / row) for row in TIMED]
    engines = [*GGUF]
    timed += [(str(gguf_of(args, row)), args.work) for row in engines]
    names = [TORCH, *TIMED, *engines]
    if not any(table.missing(row, "tokens_per_second") for row in names):
        return
    draw = random.Random(0)
    prompt = [draw.randrange(300, 49152) for _ in range(PROMPT_TOKENS)]
    found = take_turns(timed, prompt=prompt, new_tokens=NEW_TOKENS, rounds=args.rounds)
    for row, speed in zip(names, found, strict=True):
        table.put(row, **speed.record(PROMPT_TOKENS).to_json())


def judge(args: argparse.Namespace, table: Table) -> None:
    """Perplexity of every row whose folder is there."""
    for row in STORED:
        if table.missing(row, "perplexity") and not table.missing(row, "file_bytes"):
            found = secateur.evaluate(
                args.work / row, text=str(args.text), sequence_length=2048, windows=args.windows
            )
            table.put(row, perplexity=found.perplexity)
    windows = windows_of(str(args.text), args.windows)
    for row in GGUF:
        if table.missing(row, "perplexity"):
            table.put(row, perplexity=math.exp(llama_cpp_loss(gguf_of(args, row), windows)))


def score(args: argparse.Namespace, table: Table) -> None:
    """Tasks of every row whose folder is there."""
    data = str(write_tasks(cache_folder() / "tasks", *FIVE))
    for row in STORED:
        if table.missing(row, "tasks") and not table.missing(row, "file_bytes"):
            found = secateur.evaluate(
                args.work / row, tasks=[*FIVE], task_data=data, limit=ITEMS
            ).tasks
            table.put(row, tasks={x.task: x.value for x in found if x.metric == "acc"})


SHOWN = {
    "no zeros, bfloat16, in torch": "no zeros, bfloat16",
    "no zeros, int8": "no zeros, int8",
    "no zeros, int4": "no zeros, int4",
    "50 % zeros, int8": "balanced, int8",
    "50 % zeros, int4": "balanced, int4",
    **{row: row for row in GGUF},
}


def shown(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The README's table."""
    known: dict[str, dict[str, Any]] = {}
    for row in rows:  # torch and our kernels run the same file
        known.setdefault(row["row"].removesuffix(", torch"), {}).update(row)
    columns = ["", "weight files", "tokens per second", "WikiText-2 perplexity"]
    lines = []
    for label, name in SHOWN.items():
        row = known[name]
        size, speed = f"{row['file_bytes'] / 2**20:.0f} MiB", f"{row['tokens_per_second']:.0f}"
        lines.append([label, size, speed, f"{row['perplexity']:.2f}"])
    return columns, lines


TABLES = {"readme": shown}


def main() -> None:
    """Fill the table, as far as asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, kept")
    parser.add_argument("--windows", type=int, default=20, help="of 2048 tokens, judged")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="*", default=["make", "time", "judge", "score"])
    args = parser.parse_args()
    args.model = MODEL
    args.work.mkdir(parents=True, exist_ok=True)
    print(heading())
    table = Table({"windows": args.windows, "rounds": args.rounds})
    parts = {"make": make, "time": time_rows, "judge": judge, "score": score}
    for part, action in parts.items():
        if part in args.parts:
            action(args, table)
    columns = ("row", "file_bytes", "tokens_per_second", "perplexity")
    rows = [[str(row.get(name, "")) for name in columns] for row in table.rows.values()]
    print(markdown([*columns], rows))


if __name__ == "__main__":
    main()
