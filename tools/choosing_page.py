"""Write docs/choosing.md: from what must get better to a command. Its numbers are benchmarks' rows.

python tools/choosing_page.py          # write the page
python tools/choosing_page.py --check  # fail if it is out of date
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from written_files import table, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = Path("docs/choosing.md"), Path("benchmarks/results")

Row = dict[str, Any]

EFFORTS = {
    "`--effort fast`": ("presets", "fast"),
    "`--effort balanced`": ("presets", "balanced"),
    "`--effort thorough`": ("presets", "thorough"),
    "`--effort best`": ("presets", "best"),
    "Wanda": ("presets", "wanda"),
}
"""The first cell of each line, with the benchmark and the row that it shows."""

WAYS = (
    ("nothing is decided yet", "advice without a run",
     "advise MODEL --hardware a100-80gb"),
    ("files or memory, to {int8}", "[int8](#int8-int4-and-zeros)",
     "compress MODEL --values int8 --output SMALL"),
    ("files or memory, to {int4}", "[int4](#int8-int4-and-zeros)",
     "compress MODEL --values int4 --calibration TEXT --output SMALL"),
    ("files or memory, to {all_int4}",
     "[int4, embedding too](methods/joint-rounding.md#embedding-and-head)",
     "compress MODEL --values int4 --embeddings int4 --calibration TEXT --output SMALL"),
    ("files or memory, to a given size", "[fit](fit.md)",
     "fit MODEL --max-size 60MiB --output SMALL"),
    ("a file for llama.cpp, at a given size", "[GGUF files](gguf.md#a-size)",
     "fit MODEL --target llama.cpp --max-size 4.5GB --output SMALL"),
    ("a mixture of experts, made smaller", "[experts](methods/experts.md)",
     "structure MIXTURE --experts 0.75 --calibration TEXT --output FEWER"),
    ("a GGUF file of a mixture, made smaller", "[fewer experts](gguf.md#a-file-is-cut)",
     "structure FILE.gguf --experts 0.75 --output SMALLER.gguf"),
    ("speed on a CPU", "[int4](#int8-int4-and-zeros)",
     "compress MODEL --values int4 --calibration TEXT --output SMALL"),
    ("speed, with exactly the same output", "[a draft](draft.md)",
     "draft MODEL --calibration TEXT --output DRAFT"),
    ("speed in any engine", "[a cut](#cut-units-out)",
     "structure MODEL --keep-parameters 0.8 --output CUT"),
    ("speed on sparse tensor cores", "[2:4 zeros](#prune-weights)",
     "prune MODEL --pattern 2:4 --effort best --output SPARSE"),
    ("cost of a token", "[advice](advise.md)", "advise MODEL --hardware h200"),
    ("quality after one of these", "[training](#train-after-it)",
     "train SPARSE --teacher MODEL --text TEXT --output TRAINED"),
)  # fmt: skip


def main() -> None:
    """Write the page, or check it."""
    write_or_check(ROOT, {PAGE: page()}, "choosing_page.py")


def page() -> str:
    """The text of the page."""
    parts = (head(), low_bits(), presets(), cuts(), training(), sources())
    lines = [line for part in parts for line in part]
    return (
        "\n".join([*lines[:1], "", "<!-- computed: the page -->", *lines[1:], "<!-- end -->"])
        + "\n"
    )


def head() -> Iterable[str]:
    """From what must get better to a command."""
    yield "# Choose what to do with a model"
    yield ""
    yield (
        "From what must get better to a command. Unless a table says otherwise, the model is "
        "SmolLM2-135M; larger models lose less."
    )
    yield ""
    shares = stored_shares()
    lines = [(what.format(**shares), take, f"`secateur {words}`") for what, take, words in WAYS]
    yield from table(("what must get better", "take", "command"), lines)
    yield "Then look at what was lost:"
    yield "`secateur evaluate SMALL --dense MODEL --tasks hellaswag,piqa --generation`."
    yield ""


FRACTIONS = {"half": 1 / 2, "a third": 1 / 3, "a quarter": 1 / 4}


def stored_shares() -> dict[str, str]:
    """What is left of the bytes of a bfloat16 model, in words and in per cent."""
    stored = {r["row"]: r.get("file_bytes") for r in rows("first-page")}
    small = one(rows("fit-rivals"), contender="secateur int4, embeddings int4")
    found = {
        "int8": stored["no zeros, int8"],
        "int4": stored["no zeros, int4"],
        "all_int4": small["bytes"],
    }
    shares = {name: size / stored["no zeros, bfloat16"] for name, size in found.items()}
    return {
        name: f"{min(FRACTIONS, key=lambda word: abs(FRACTIONS[word] - share))} ({share:.0%})"
        for name, share in shares.items()
    }


def rows(name: str) -> list[Row]:
    """The rows of a benchmark."""
    record = json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    found: list[Row] = record["rows"]
    return found


def one(found: Iterable[Row], **wanted: Any) -> Row:
    """The first row with these values."""
    return next(r for r in found if all(r.get(key) == value for key, value in wanted.items()))


SOURCES = (
    ("Sizes", ("first-page", "fit-rivals"), ""),
    ("int8, int4 and zeros", ("first-page", "int4-models"),
     "zeros by `--effort balanced`, loss with rounded activations; the model of 1.1 B has "
     "random weights"),
    ("Prune weights", ("presets",), "rows with a time: one seed; others: means over seeds"),
    ("Cut units out", ("structure", "structure-speed"), ""),
    ("Train after it", ("recovery",),
     "they read the training parts of both texts; four windows of each judge"),
)  # fmt: skip
"""Heading, results and conditions of each table."""


def sources() -> Iterable[str]:
    """The files that the tables are made from, and how they were measured."""
    yield "## Where the numbers come from"
    yield ""
    yield "`python tools/choosing_page.py` writes this page from `benchmarks/results`."
    yield ""
    for heading, names, how in SOURCES:
        links = ", ".join(f"[{name}.json](../{RESULTS}/{name}.json)" for name in names)
        yield f"- **{heading}** ({links})" + f": {how}." * bool(how)


def low_bits() -> Iterable[str]:
    """Rounding and zeros: loss, speed, memory."""
    speed, stored = rows("int4-models"), rows("first-page")

    def stored_rise(row: str) -> str:
        judged = [one(stored, row=r)["perplexity"] for r in (row, "no zeros, bfloat16")]
        return f"{math.log(judged[0] / judged[1]):+.3f}"

    def large(backend: str) -> Row:
        return one(speed, model="1.1b", contender=backend)

    lines = []
    for storage, backend in (
        ("int8", "dense int8"),
        ("int4", "dense int4"),
        ("50 % zeros, int8", "50 % int8"),
        ("50 % zeros, int4", "50 % int4"),
    ):
        smol = f"balanced, {storage[-4:]}" if "zeros" in storage else f"no zeros, {storage}"
        found = large(backend)
        lines.append((
            storage, stored_rise(smol), f"{one(stored, row=smol)['tokens_per_second']:.0f}",
            f"{found['tokens_per_second']:.0f}", f"{found['resident_bytes'] / 2**20:.0f} MiB",
        ))  # fmt: skip
    gains = [
        large(zeros)["tokens_per_second"] / large("dense int4")["tokens_per_second"]
        for zeros in ("50 % int4", "2:4 int4", "70 % int4")
    ]
    yield "## int8, int4 and zeros"
    yield ""
    yield "Loss in nats per token above the unrounded model; tokens a second on two CPU cores."
    yield ""
    columns = ("every linear layer", "loss, SmolLM2", "tokens/s, SmolLM2",
               "tokens/s, 1.1 B of random weights", "memory, 1.1 B")  # fmt: skip
    yield from table(columns, lines)
    yield (
        "Quantization alone comes first: int4 loses less than 50 % zeros and is faster. Zeros "
        "beside int8 make a CPU faster. Zeros beside int4 make a model of a billion parameters "
        f"{gains[0]:.1f} (50 %), {gains[1]:.1f} (2:4) and {gains[2]:.1f} times (70 %) faster, and "
        "a narrow one slower. Below four bits, or at a size that must be met, [fit](fit.md) "
        "measures what is best for each matrix."
    )
    yield ""


def presets() -> Iterable[str]:
    """Pruning weights: perplexity by preset and sparsity."""
    timed = rows("presets")
    columns = ("30 %", "50 %", "60 %", "70 %", "4:8", "2:4")

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
    yield f"Perplexity on WikiText-2 before anything is rounded; dense {dense:.1f}."
    yield ""
    yield from table(("", *columns, "core minutes at 50 %"), lines)
    yield (
        "`secateur prune MODEL --sparsity 0.5 --output SPARSE`; `secateur sweep MODEL` shows how "
        "far your model can go. An ordinary GPU engine stores zeros as zeros: there only 2:4 "
        "gains, where a kernel exists."
    )
    yield ""


def took(timed: Iterable[Row], row: str) -> str:
    """The core minutes of a run to 50 %; empty where other programs ran beside it."""
    found = (r.get("core_minutes") for r in timed if (r["row"], r["column"]) == (row, "50 %"))
    return next((f"{minutes:.0f}" for minutes in found if minutes is not None), "")


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
        for level in (0.1, 0.2, 0.3):
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
        "engine."
    )
    yield ""
    columns = ("cut", "flag", "perplexity", "faster in transformers", "faster in llama.cpp, Q8_0")
    yield from table(columns, lines)
    yield (
        "`secateur structure MODEL --keep-parameters 0.8 --output CUT`. At the same share, cuts "
        "lose more than zeros, and layers more than neurons. Plan to train after a cut."
    )
    yield ""


def training() -> Iterable[str]:
    """Training after it."""
    found = rows("recovery")
    lines = []
    for start in ("2:4", "a quarter cut"):
        of = [r for r in found if r["start"] == start]
        before = one(of, way="")["perplexity"]
        after = min((r for r in of if r["way"]), key=lambda r: r["perplexity"]["C4"])
        texts = ("WikiText-2", "C4")
        lines.append((
            start, *(f"{before[t]:.1f}" for t in texts), after["way"], f"{after['tokens']:,}",
            *(f"{after['perplexity'][t]:.1f}" for t in texts),
        ))  # fmt: skip
    dense = one(found, start="dense")["perplexity"]
    yield "## Train after it"
    yield ""
    yield (
        f"Perplexity on WikiText-2 and C4; dense {dense['WikiText-2']:.1f} and {dense['C4']:.1f}."
    )
    yield ""
    columns = (
        "start",
        "WikiText-2",
        "C4",
        "way",
        "tokens",
        "WikiText-2 after",
        "C4 after",
    )
    yield from table(columns, lines)
    yield "[Training](training.md) says how; all zeros stay zero."
    yield ""


if __name__ == "__main__":
    main()
