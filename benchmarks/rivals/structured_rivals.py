"""Cut SmolLM2-135M smaller with the published structured-pruning codes, and judge as ours is.

    python -m benchmarks.rivals.structured_rivals windows WORK --text WikiText-2=wiki.txt C4=held-out.jsonl
    RIVALS/bin/python -m benchmarks.rivals.structured_rivals run sleb WORK MODEL WINDOWS.safetensors \\
        --checkout SLEB --levels 0.2 0.3
    python -m benchmarks.rivals.structured_rivals table

`windows` and `table` run in our environment. `run` runs in that of `rivals.py` (torch, safetensors,
numpy below 2, transformers 4.36); MODEL is a folder, WINDOWS the calibration windows of
`presets.py` (64 of 512 tokens), which replace the loader of every rival. A level is the fraction
of the parameters of all decoder layers that is to go; biases, norms and shortcut matrices that a
rival adds count as its own, embeddings and the output head do not. Perplexity: float32, first 24
non-overlapping windows of 2048 tokens, loss over each window's own next tokens; excess = its
logarithm less that of the dense model. Every finished row is kept in
`results/structured-rivals.json` at once and skipped when it is there, text by text; WORK keeps the
cut models, so that another text can be judged later, and the losses that SLEB measured. Seconds
are those of the processor, one thread; of FLAP and SliceGPT's first rows those of the wall beside
other work, of LLM-Pruner's, which was suspended meanwhile, null.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import time
import types
from pathlib import Path
from typing import Any

import torch
from benchmarks.rivals.rivals import load_model
from benchmarks.rivals.structured_codes import RIVALS, Task, decoder_parameters, package, stand_in
from benchmarks.stored import Rows, alone, known_rows, write_rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

MEASURES = ()  # published code, none of ours
MINUTES = 90

STORED = "structured-rivals"
LEVELS = (0.1, 0.2, 0.3, 0.5)
JUDGED = "judged.safetensors"
PROTOCOL = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "windows": 24,
    "sequence_length": 2048,
    "calibration": "64 x 512 tokens, random-crop, seed 0",
    "level": "fraction of the parameters of all decoder layers removed",
    "excess": "ln perplexity - ln dense perplexity",
}


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor) -> float:
    """As in `secateur.evaluation.perplexity`."""
    losses = []
    for window in windows:
        states = model.model(window[None], use_cache=False).last_hidden_state[0, :-1]
        parts = zip(states.split(256), window[1:].split(256), strict=True)
        found = [
            functional.cross_entropy(model.lm_head(s).float(), t, reduction="none")
            for s, t in parts
        ]
        losses.append(torch.cat(found).double().mean())
    return torch.stack(losses).mean().exp().item()


def heading() -> str:
    """Hardware, versions and day; the rivals' environment has no Secateur."""
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, beside other work; "
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def keep(row: dict[str, Any]) -> None:
    """Write a row in place of what was known of it; several processes may do so at once."""
    with alone():
        write_rows(STORED, heading(), PROTOCOL, with_excess(row))


def with_excess(row: dict[str, Any]) -> Rows:
    """All rows, this one among them."""
    this = (row["row"], row["level"])
    rows = [r for r in known_rows(STORED) if (r["row"], r["level"]) != this]
    reference = next((r for r in [*rows, row] if r["row"] == "dense"), {"perplexity": {}})
    rows = sorted([*rows, row], key=lambda r: ([*RIVALS].index(r["row"]), r["level"]))
    for r in rows:
        r["excess"] = {
            text: math.log(value / reference["perplexity"][text])
            for text, value in r["perplexity"].items()
            if text in reference["perplexity"]
        }
    return rows


def cut(args: argparse.Namespace, level: float, whole: int) -> tuple[Any, dict[str, Any]]:
    """The cut model, and what is said of it; from WORK if it was cut before."""
    file = args.work / f"{args.rival}-{level}.pt"
    if file.exists():
        return torch.load(file, weights_only=False)
    windows = load_file(args.windows)["input_ids"].to(torch.int64)
    start = time.process_time()
    model, details = RIVALS[args.rival](Task(args.model, args.checkout, windows, args.work), level)
    seconds = time.process_time() - start
    removed = whole - decoder_parameters(model)
    row = {
        "row": args.rival, "level": level, "commit": commit_of(args.checkout),
        "removed": removed, "fraction": removed / whole,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds, "details": details, "measured": heading(), "perplexity": {},
    }  # fmt: skip
    torch.save((model.eval(), row), file)
    return model, row


def commit_of(checkout: Path | None) -> str | None:
    if checkout is None:
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(args: argparse.Namespace) -> None:
    """Cut and judge, level by level."""
    torch.set_num_threads(1)
    if args.rival == "slicegpt":
        package("slicegpt", args.checkout / "src" / "slicegpt")
        stand_in("ml_collections", ConfigDict=types.SimpleNamespace)
    judged = load_file(args.work / JUDGED)
    whole = decoder_parameters(load_model(args.model))
    for level in args.levels if args.rival != "dense" else [0.0]:
        known = {(r["row"], r["level"]): r["perplexity"] for r in known_rows(STORED)}
        texts = [x for x in args.texts or judged if x not in known.get((args.rival, level), {})]
        if not texts:
            continue
        model, row = cut(args, level, whole)
        row["perplexity"] = dict(known.get((args.rival, level), {}))
        for text in texts:
            row["perplexity"][text] = perplexity(model.float().eval(), judged[text])
            keep(row)
            print(row["row"], level, row["fraction"], row["perplexity"], row["seconds"], flush=True)


def write_windows(args: argparse.Namespace) -> None:
    """The windows that all are judged on, made by our evaluation."""
    from secateur.calibration.documents import read_text
    from secateur.calibration.windows import evaluation_windows
    from secateur.models.sources import resolve
    from secateur.models.tokenizer import load_tokenizer

    folder = resolve("smollm2-135m").folder
    tokenizer = load_tokenizer(folder)
    texts = {name: read_text(file).text for name, file in (t.split("=", 1) for t in args.text)}
    args.work.mkdir(parents=True, exist_ok=True)
    windows = {
        name: evaluation_windows(text, tokenizer, 2048, max_windows=24)
        for name, text in texts.items()
    }
    save_file(windows, args.work / JUDGED)
    print(f"the dense model is in {folder}")


NAMES = {
    "slicegpt": "SliceGPT", "shortgpt": "ShortGPT", "sleb": "SLEB", "flap": "FLAP",
    "llm-pruner": "LLM-Pruner", "osscar-heads": "OSSCAR, KV groups and neurons",
    "osscar": "OSSCAR, neurons",
}  # fmt: skip


def excess(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The excess loss of each published code, by the share of the decoder that went."""
    levels = sorted({r["level"] for r in rows if r["level"]})
    found = {(r["row"], r["level"]): r["excess"]["WikiText-2"] for r in rows}
    lines = [[shown, *(f"{found[x, y]:.3f}" for y in levels)] for x, shown in NAMES.items()]
    return ["published code", *(f"{level:.0%}" for level in levels)], lines


TABLES = {"excess": excess}


def table(_: argparse.Namespace) -> None:
    """Print the table."""
    from benchmarks.hardware import markdown

    print(markdown(*excess(known_rows(STORED))))


def main() -> None:
    """Make windows, run a rival, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("windows")
    made.add_argument("work", type=Path)
    made.add_argument("--text", nargs="+", required=True)
    made.set_defaults(do=write_windows)
    one = commands.add_parser("run")
    one.add_argument("rival", choices=[*RIVALS])
    one.add_argument("work", type=Path)
    one.add_argument("model", type=Path)
    one.add_argument("windows", type=Path)
    one.add_argument("--checkout", type=Path)
    one.add_argument("--levels", nargs="+", type=float, default=LEVELS)
    one.add_argument("--texts", nargs="*", help="of those in WORK; all by default")
    one.set_defaults(do=run)
    commands.add_parser("table").set_defaults(do=table)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
