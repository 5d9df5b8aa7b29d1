"""Vocabulary trimming: SmolLM2-135M with the tokens that English text needs.

    python -m benchmarks.quality.vocabulary --count c4.jsonl --text wiki.txt --work DIR [--sizes 16384]

Protocol: SmolLM2-135M in float32. Tokens are counted in the file `--count`; the first row keeps all
of them, the others the given number of the most frequent ones. The judged text is cut into non-
overlapping windows of 64 tokens of the uncut tokenizer. Perplexity, before and after, is that of
the first 200 windows whose tokens all stayed. Both tokenizers encode the text of each of these
windows anew. The
removed tokens take their probability with them, so the loss can only fall; the loss of the uncut
model among the kept tokens alone is the number that must not change. 10,000 random strings of all
of Unicode are encoded and decoded by both tokenizers; that of SmolLM2 itself lacks 21 bytes.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.models.sources import resolve

MEASURES = ("src/secateur/structured/vocabulary.py", "src/secateur/structured/token_pieces.py")
PROOF = ("llama/vocabulary", "llama/vocabulary size")
MINUTES = 4

MODEL, LENGTH, WINDOWS, STRINGS = "smollm2-135m", 64, 200, 10_000


def loss_of(model: Any, windows: list[list[int]], kept: Tensor | None = None) -> float:
    """Nats per token over each window's own next tokens; among the kept tokens, if given."""
    total = 0.0
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            logits: Tensor = model(ids).logits[0, :-1].float()
            if kept is not None:
                outside = torch.ones(logits.shape[1], dtype=torch.bool)
                outside[kept] = False
                logits = logits.masked_fill(outside, -torch.inf)
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    return total / len(windows)


def random_strings() -> list[str]:
    """Strings of 1 to 40 characters of all of Unicode, without halves of pairs."""
    pick = random.Random(0)
    ranges = [(32, 127), (160, 0xD800), (0xE000, 0x110000)]
    return [
        "".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(pick.randint(1, 40)))
        for _ in range(STRINGS)
    ]


def measured(args: argparse.Namespace, size: int | None) -> dict[str, Any]:
    """One row."""
    source = resolve(MODEL).folder
    folder = args.work / f"vocabulary-{size}"
    made = secateur.structure(
        MODEL, output=folder, vocabulary=args.count, vocabulary_size=size, overwrite=True
    ).manifest
    step = made.structure.steps[0]
    old, new = (AutoTokenizer.from_pretrained(x) for x in (source, folder))
    kept = set(new.get_vocab())
    ids = old(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = [ids[n : n + LENGTH] for n in range(0, len(ids) - LENGTH + 1, LENGTH)]
    whole = [w for w in windows if kept.issuperset(old.convert_ids_to_tokens(w))]
    judged = whole[:WINDOWS]
    renamed = [new.convert_tokens_to_ids(old.convert_ids_to_tokens(w)) for w in judged]
    texts = [old.decode(w) for w in judged]
    pairs = [(old.tokenize(text), new.tokenize(text)) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(source)
    tokens = new.convert_ids_to_tokens(range(len(new)))
    index = torch.tensor(old.convert_tokens_to_ids(tokens))
    losses = [
        loss_of(model, judged),
        loss_of(model, judged, index),
        loss_of(AutoModelForCausalLM.from_pretrained(folder), renamed),
    ]
    strings = random_strings()
    backs = decoded((old, new), strings)
    return {
        "size": size,
        **sizes_of(made),
        "covered": step["covered"],
        "covered_of_text": sum(t in kept for t in old.convert_ids_to_tokens(ids)) / len(ids),
        "windows": len(windows),
        "windows_that_stay": len(whole),
        "windows_judged": len(judged),
        "windows_encoded_alike": sum(a == b for a, b in pairs),
        "perplexity_before": math.exp(losses[0]),
        "perplexity_among_kept": math.exp(losses[1]),
        "perplexity": math.exp(losses[2]),
        "longer": sum(map(len, new(chunks(args.text))["input_ids"]))
        / sum(map(len, old(chunks(args.text))["input_ids"])),
        "round_trips_before": sum(a == b for a, b in zip(strings, backs[0], strict=True)),
        "round_trips": sum(a == b for a, b in zip(strings, backs[1], strict=True)),
        "decoded_alike": sum(a == b for a, b in zip(*backs, strict=True)),
        "seconds": made.cost.seconds,
    }


def sizes_of(made: Any) -> dict[str, int]:
    """Tokens, weights and bytes before and after a cut of tokens."""
    structure, [step] = made.structure, made.structure.steps[:1]
    found = {"tokens": step["tokens_after"], "tokens_before": step["tokens_before"]}
    for name in ("parameters", "file_bytes"):
        found[name] = getattr(structure.after, name)
        found[f"{name}_before"] = getattr(structure.before, name)
    return found


def decoded(tokenizers: Iterable[Any], strings: list[str]) -> list[list[str]]:
    """Strings as each tokenizer reads them back."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [x.batch_decode(x(strings)["input_ids"], **options) for x in tokenizers]


def chunks(text: Path) -> list[str]:
    """The paragraphs of a text."""
    return text.read_text(encoding="utf-8").split("\n\n")


def trimmed(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for each size, the uncut model first."""
    columns = [
        "tokens", "parameters", "weight files", "of C4's tokens stay", "of WikiText-2's",
        "perplexity, uncut model among the kept tokens", "trimmed model", "WikiText-2 in tokens",
    ]  # fmt: skip
    first = rows[0]
    lines = [
        [f"{first['tokens_before']:,}", f"{first['parameters_before'] / 1e6:.1f} M",
         f"{first['file_bytes_before'] / 2**20:.1f} MiB", "", "", "", "", "1"],
        *(
            [f"{r['tokens']:,}", f"{r['parameters'] / 1e6:.1f} M",
             f"{r['file_bytes'] / 2**20:.1f} MiB", f"{r['covered']:.1%}",
             f"{r['covered_of_text']:.1%}", f"{r['perplexity_among_kept']:.4f}",
             f"{r['perplexity']:.4f}", f"{r['longer']:.3f}"]
            for r in rows
        ),
    ]  # fmt: skip
    return columns, lines


TABLES = {"trimmed": trimmed}


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[32768, 24576, 16384])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    protocol = {
        "model": MODEL, "count": args.count.name, "text": args.text.name, "length": LENGTH,
        "windows": WINDOWS, "strings": STRINGS,
    }  # fmt: skip
    print(heading())
    for size in [None, *args.sizes]:
        if size not in {row["size"] for row in known_rows("vocabulary", protocol)}:
            row = measured(args, size)
            print(row, flush=True)
            add("vocabulary", protocol, row)
    print(markdown(*trimmed(known_rows("vocabulary", protocol))))


if __name__ == "__main__":
    main()
