"""Pruning at once, while a model trains, and in rounds: SmolLM2-135M at 50 and 80 %, with times.

    python -m benchmarks.quality.gradual --calibration c4.jsonl \\
        --train C4=c4.jsonl WikiText-2=wiki-train.txt --text WikiText-2=wiki.txt C4=held-out.txt

Protocol: every row of a column ends with as many zeros in the decoder. All that train take
`--steps` steps of one window of 512 tokens in all, so they read the same tokens; what differs is
when the zeros come. Iterative pruning divides the steps among four rounds and rewinds the rate.
The embeddings stay as they are. `balanced` and Wanda calibrate at once on 64 windows of 512 tokens
of `--calibration`; gradual and iterative pruning by Wanda on 16 windows of the training text at
every new mask. Texts, judge and threads as in `recovery.py`; minutes are those of the whole
commands, with reading and writing.

Every finished row is kept in `results/gradual.json` at once and skipped when it is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.quality.recovery import MODEL, Row, files, judged, parser_of
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/training",)
MINUTES = 90

ROUNDS = 4
SPARSITIES = (0.5, 0.8)
ONE_SHOT: dict[str, dict[str, Any]] = {
    "Wanda": {"method": "wanda"},
    "balanced": {"effort": "balanced"},
}
ROWS: dict[str, dict[str, Any]] = {
    "balanced": {"first": "balanced"},
    "balanced, then trained": {"first": "balanced", "train": {}},
    "Wanda": {"first": "Wanda"},
    "Wanda, then trained": {"first": "Wanda", "train": {}},
    "gradual, by magnitude": {"train": {"gradual": {}}},
    "gradual, by Wanda": {"train": {"gradual": {"score": "wanda"}}},
    "iterative, by Wanda": {"train": {"iterative": {"score": "wanda"}}},
}
"""What is done at once, and how it trains."""


def proof(row: Row) -> list[str]:
    """The command lines that write weights as a row does."""
    how = ROWS.get(row["name"], {})
    first = {"balanced": ["llama/balanced"], "Wanda": ["llama/wanda"]}.get(how.get("first", ""), [])
    return first + [f"llama/{way}" for way in how.get("train", ()) or ("train",)]


def pruned(args: argparse.Namespace, method: str, sparsity: float, models: Path) -> Path:
    """The folder of a model that is pruned at once."""
    folder = models / f"{method}-{sparsity:g}"
    if not folder.exists():
        text: dict[str, Any] = {"calibration": args.calibration, "windows": 64,
                                "sequence_length": 512, "packing": "random-crop"}  # fmt: skip
        options = ONE_SHOT[method] | text
        secateur.prune(MODEL, output=folder, sparsity=sparsity, **options)
    return folder


def trained(
    args: argparse.Namespace, name: str, sparsity: float, start: str | Path, models: Path
) -> Path:
    """The folder of a model after its training."""
    folder = models / f"{name}-{sparsity:g}".replace(",", "").replace(" ", "-")
    how = {way: {"sparsity": sparsity, **keys} for way, keys in ROWS[name]["train"].items()}
    if "iterative" in how:
        how["iterative"]["rounds"] = ROUNDS
    secateur.train(
        start,
        output=folder,
        resume=folder.with_name(folder.name + ".partial").exists(),
        text=list(files(args.train).values()) or [args.calibration],
        steps=args.steps // ROUNDS if "iterative" in how else args.steps,
        batch=1,
        validation_windows=0,
        rates={"*embed*": 0.0},
        **how,
    )
    return folder


def seconds(folder: Path) -> float:
    """How long the command took that wrote a folder."""
    records = folder / "secateur"
    if (records / "training.json").exists():
        last = json.loads((records / "training.json").read_text(encoding="utf-8"))[-1]
    else:
        last = json.loads((records / "manifest.json").read_text(encoding="utf-8"))
    return float(last["cost"]["seconds"])


def row(args: argparse.Namespace, name: str, sparsity: float, models: Path) -> Row:
    """Make a row's model, and judge it."""
    how = ROWS[name]
    folders: list[Path] = []
    if "first" in how:
        folders.append(pruned(args, how["first"], sparsity, models))
    if "train" in how:
        start = folders[0] if folders else MODEL
        folders.append(trained(args, name, sparsity, start, models))
    return {
        "name": name,
        "sparsity": sparsity,
        "seconds": sum(seconds(folder) for folder in folders),
        "perplexity": judged(args, folders[-1]),
    }


def zeros(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Perplexity on both texts at each sparsity, and the minutes of a core at the last one."""

    def cell(found: Row) -> str:
        return " / ".join(f"{value:.1f}" for value in found["perplexity"].values())

    dense = next(r for r in rows if r["name"] == "dense")
    lines = [["dense", *(cell(dense) for _ in SPARSITIES), ""]]
    for name in ROWS:
        found = {r["sparsity"]: r for r in rows if r["name"] == name}
        if all(s in found for s in SPARSITIES):
            minutes = f"{found[SPARSITIES[-1]]['seconds'] / 60:.1f}"
            lines.append([name, *(cell(found[s]) for s in SPARSITIES), minutes])
    return ["", *(f"{s:.0%}".replace("%", " %") for s in SPARSITIES), "minutes"], lines


TABLES = {"zeros": zeros}


def main() -> None:
    """Make, judge and keep, row by row."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", default=[*ROWS], help="names of rows")
    parser.add_argument("--sparsities", nargs="*", type=float, default=[*SPARSITIES])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading(), flush=True)
    protocol = {"windows": args.windows, "sequence_length": 2048, "steps": args.steps,
                "length": 512, "trained on": " and ".join(files(args.train))}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch)
        known = {(r["name"], r.get("sparsity")) for r in known_rows("gradual", protocol)}
        if ("dense", None) not in known:
            add("gradual", protocol, {"name": "dense", "perplexity": judged(args, MODEL)})
        for name, sparsity in ((n, s) for n in args.only for s in args.sparsities):
            if (name, sparsity) not in known:
                found = row(args, name, sparsity, models)
                add("gradual", protocol, found)
                print(found, flush=True)
    print(markdown(*zeros(known_rows("gradual", protocol))))


if __name__ == "__main__":
    main()
