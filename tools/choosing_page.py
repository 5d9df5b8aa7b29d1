"""Write docs/choosing.md: from what must get better to a command. Its numbers are benchmarks' rows.

python tools/choosing_page.py          # write the page
python tools/choosing_page.py --check  # fail if it is out of date
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from written_files import table, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = Path("docs/choosing.md"), Path("benchmarks/results")

Row = dict[str, Any]

EFFORTS = {
    "`--effort fast`": ("presets", "fast"),
    "`--effort balanced`": ("presets-curve", "balanced"),
    "`--effort thorough`": ("presets-curve", "thorough"),
    "`--effort best`": ("presets-curve", "best"),
    "`--effort balanced --allocation uniform`": ("presets", "balanced"),
    "an earlier `best`, 98,304 tokens": ("presets", "best, 98,304 tokens"),
    "Wanda": ("presets", "wanda"),
}
"""The first cell of each line, with the benchmark and the row that it shows."""

WAYS = (
    ("nothing is decided yet", "advice without a run",
     "advise MODEL --hardware a100-80gb --requests-per-day 1e6"),
    ("files or memory, down to half", "[int8](#int8-int4-and-zeros)",
     "compress MODEL --values int8 --output SMALL"),
    ("files or memory, down to a quarter", "[int4](#int8-int4-and-zeros)",
     "compress MODEL --values int4 --calibration TEXT --output SMALL"),
    ("files or memory, to a given size", "[fit](fit.md)",
     "fit MODEL --max-size 60MiB --output SMALL"),
    ("speed on a CPU", "[int4](#int8-int4-and-zeros)",
     "compress MODEL --values int4 --calibration TEXT --output SMALL"),
    ("speed, with exactly the same output", "[a draft](howto/draft.md)",
     "draft MODEL --calibration TEXT --output DRAFT"),
    ("speed in any engine", "[a cut](#cut-units-out)",
     "structure MODEL --keep-parameters 0.8 --output CUT"),
    ("speed on sparse tensor cores", "[2:4 zeros](#prune-weights)",
     "prune MODEL --pattern 2:4 --effort best --output SPARSE"),
    ("cost of a service", "[advice](advise.md)", "advise MODEL --hardware h200 --html page.html"),
    ("quality after one of these", "[training](#train-after-it)",
     "train SPARSE --teacher MODEL --text TEXT --output TRAINED"),
)  # fmt: skip


def main() -> None:
    """Write the page, or check it."""
    write_or_check(ROOT, {PAGE: page()}, "choosing_page.py")


def page() -> str:
    """The text of the page."""
    parts = (head(), low_bits(), presets(), cuts(), training())
    return "\n".join(line for part in parts for line in part) + "\n"


def head() -> Iterable[str]:
    """From what must get better to a command."""
    yield "# Choose what to do with a model"
    yield ""
    yield (
        "This page leads from what must get better to a command. `python tools/choosing_page.py` "
        "writes it, and every number is from `benchmarks/results`. Unless a table says otherwise, "
        "the model is SmolLM2-135M. Small models lose the most."
    )
    yield ""
    lines = [(what, take, f"`secateur {words}`") for what, take, words in WAYS]
    yield from table(("what must get better", "take", "command"), lines)
    yield "Then look at what was lost:"
    yield "`secateur evaluate SMALL --dense MODEL --tasks hellaswag,piqa --generation`."
    yield ""


def rows(name: str) -> list[Row]:
    """The rows of a benchmark."""
    record = json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    found: list[Row] = record["rows"]
    return found


def one(found: Iterable[Row], **wanted: Any) -> Row:
    """The first row with these values."""
    return next(r for r in found if all(r.get(key) == value for key, value in wanted.items()))


def sources(names: Sequence[str]) -> str:
    """Links to the files that a table is made from."""
    return ", ".join(f"[{name}.json](../{RESULTS}/{name}.json)" for name in names)


def low_bits() -> Iterable[str]:
    """Rounding and zeros: loss, speed, memory."""
    loss, speed, stored = rows("low-bits"), rows("int4-models"), rows("first-page")

    def rise(row: str, column: str) -> str:
        dense = one(loss, model="trained", row="not rounded")["loss"]
        found = one(loss, model="trained", row=row, column=column)
        return f"{found['loss'] - dense:+.3f}"

    def stored_rise(row: str) -> str:
        judged = [one(stored, row=r)["perplexity"] for r in (row, "no zeros, bfloat16")]
        return f"{math.log(judged[0] / judged[1]):+.3f}"

    lines = []
    for storage, row, column, backend in (
        ("int8", "dense", "50 % + int8", "dense int8"),
        ("int4", "dense", "50 % + int4, groups of 64", "dense int4"),
        ("50 % zeros, int8", "then", "50 % + int8", "50 % int8"),
        ("50 % zeros, int4", "then", "50 % + int4, groups of 64", "50 % int4"),
    ):
        trained = column if storage.endswith("int8") else "50 % + int4, groups of 32"
        smol = f"balanced, {storage[-4:]}" if "zeros" in storage else f"no zeros, {storage}"
        small, large = (one(speed, model=m, contender=backend) for m in ("smollm2", "1.1b"))
        lines.append((
            storage, stored_rise(smol), rise(row, trained),
            *(f"{r['tokens_per_second']:.0f}" for r in (small, large)),
            f"{large['resident_bytes'] / 2**20:.0f} MiB",
        ))  # fmt: skip
    yield "## int8, int4 and zeros"
    yield ""
    yield (
        "Loss in nats per token above the unrounded model: SmolLM2-135M as it is stored and runs, "
        "activations rounded too (its source is a 4-bit file; zeros by `--effort balanced`), and a "
        "small model that was trained for this (int4 in groups of 32, zeros by ALPS). Tokens a "
        "second and memory on two virtual cores, models with random weights, embedding and head in "
        "the bits of the rest (the losses have them in int8). Sources: "
        f"{sources(('first-page', 'low-bits', 'int4-models'))}."
    )
    yield ""
    columns = ("every linear layer", "loss, SmolLM2", "loss, trained model", "tokens/s, 135M",
               "tokens/s, 1.1 B", "memory, 1.1 B")  # fmt: skip
    yield from table(columns, lines)
    yield (
        "Quantization alone comes first: int4 loses less than 50 % zeros and is as fast. Zeros "
        "beside int8 make a CPU faster. Zeros beside int4 make a model of a billion parameters 1.1 "
        "(50 %), 1.2 (2:4) and 1.45 times (70 %) faster, and a narrow one no faster. Below four "
        "bits, or at a size that must be met, [fit](fit.md) measures what is best for each matrix."
    )
    yield ""


def presets() -> Iterable[str]:
    """Pruning weights: perplexity by preset and sparsity."""
    timed = rows("presets-curve")
    columns = ("50 %", "60 %", "70 %", "4:8", "2:4")

    def cell(name: str, row: str, column: str) -> str:
        of = [r for r in rows(name) if (r["row"], r["column"]) == (row, column)]
        return f"{statistics.mean(r['perplexity']['wikitext2'] for r in of):.1f}" if of else ""

    lines = [
        (label, *(cell(name, row, c) for c in columns), took(timed, row))
        for label, (name, row) in EFFORTS.items()
    ]
    dense = one(timed, row="dense")["perplexity"]["wikitext2"]
    yield "## Prune weights"
    yield ""
    source = sources(("presets", "presets-curve"))
    yield (
        f"Perplexity on WikiText-2; dense {dense:.1f}. Rows with a time are of one seed and one "
        f"machine, of `fast` its time; the others are means over seeds. Source: {source}."
    )
    yield ""
    yield from table(("", *columns, "time at 50 %"), lines)
    yield (
        "`secateur prune MODEL --sparsity 0.5 --effort balanced --output SPARSE`. Take `thorough` "
        "or `best` where there is time, and `secateur sweep MODEL` to see how far your model can "
        "go. An ordinary GPU engine stores zeros as zeros: there only 2:4 gains, where a kernel "
        "exists."
    )
    yield ""


def took(timed: Iterable[Row], row: str) -> str:
    """The time of a run to 50 %; empty where other programs ran beside it."""
    found = (r["seconds"] for r in timed if (r["row"], r["column"]) == (row, "50 %"))
    return next((f"{seconds:.0f} s" for seconds in found), "")


def cuts() -> Iterable[str]:
    """Cutting units: perplexity and speed."""
    found, speed = rows("structure"), rows("structure-speed")

    def gain(engine: str, cut: str, level: float) -> str:
        of = [r for r in speed if r["engine"] == engine]
        cut_rows = [r for r in of if r["cut"] == f"{cut}, {level:.0%}"]
        base = one(of, cut="uncut")["tokens_per_second"]
        return f"{cut_rows[0]['tokens_per_second'] / base:.2f}x" if cut_rows else ""

    lines = []
    for cut, row, command in (
        ("middle", "middle, balanced", "`--keep-parameters`"),
        ("width", "width, balanced", "heads and neurons"),
        ("depth", "depth, influence, refitted", "`--keep-layers`"),
    ):
        for level in (0.1, 0.2, 0.3, 0.5):
            perplexity = one(found, row=row, level=level)["perplexity"]
            lines.append((
                f"{cut}, {level:.0%} of the decoder", command, f"{perplexity:.1f}",
                gain("transformers, float32", cut, level), gain("llama.cpp, Q8_0", cut, level),
            ))  # fmt: skip
    dense = one(found, row="dense")["perplexity"]
    yield "## Cut units out"
    yield ""
    yield (
        f"Perplexity on WikiText-2; dense {dense:.1f}. A cut model is smaller and faster in every "
        f"engine. Sources: {sources(('structure', 'structure-speed'))}."
    )
    yield ""
    columns = ("cut", "flag", "perplexity", "faster in transformers", "faster in llama.cpp, Q8_0")
    yield from table(columns, lines)
    yield (
        "`secateur structure MODEL --keep-parameters 0.8 --effort balanced --output CUT`. At the "
        "same share, cuts lose more than zeros, and layers more than neurons. Layers give the most "
        "speed. Plan to train after a cut."
    )
    yield ""


def training() -> Iterable[str]:
    """Training after it."""
    found = rows("recovery")
    lines = []
    for start in ("2:4", "60 %", "a quarter cut"):
        of = [r for r in found if r["start"] == start]
        before = one(of, way="")["perplexity"]
        after = min((r for r in of if r["way"]), key=lambda r: r["perplexity"]["C4"])
        texts = ("WikiText-2", "C4")
        lines.append((
            start, *(f"{before[t]:.1f}" for t in texts), after["way"], f"{after['minutes']:.0f}",
            f"{after['tokens'] / 1e6:.2f} M", *(f"{after['perplexity'][t]:.1f}" for t in texts),
        ))  # fmt: skip
    dense = one(found, start="dense")["perplexity"]
    yield "## Train after it"
    yield ""
    yield (
        f"Perplexity on WikiText-2 and C4; dense {dense['WikiText-2']:.1f} and {dense['C4']:.1f}. "
        "The best of some trainings of 20 minutes on two virtual cores; they read the training "
        f"parts of both texts. Source: {sources(('recovery',))}."
    )
    yield ""
    columns = (
        "start",
        "WikiText-2",
        "C4",
        "way",
        "minutes",
        "tokens",
        "WikiText-2 after",
        "C4 after",
    )
    yield from table(columns, lines)
    yield "[Training](training.md) says how; all zeros stay zero."


if __name__ == "__main__":
    main()
