"""Fewer bits with the zeros kept: pruning and rounding solved together, or one after the other.

    python -m benchmarks.quality.low_bits --calibration c4.jsonl --text wiki.txt

Two models. `trained` is the small Llama of `tests/support/trained.py`, trained here in float32, which
reads Python letter by letter: 256 windows of 64 letters of its own text calibrate it, and the held
out files judge it (256 windows of 64). `smollm2` is SmolLM2-135M; its source is a 4-bit file (Q4_1)
with another grid, so its dense weights have only 16 values in a group of 32.
As `make demo` does, 20 windows of 512 tokens prune it; `then` rounds with 16, as the rivals of the
research notes. The first `--windows` windows of 512 tokens of the text judge it.

Rows, all with float norms, embeddings and head:

* `pruned`: not rounded.
* `nearest`: the pruned model, every weight rounded to the nearest point of its grid.
* `then`: the pruned model, rounded with calibration text (as `secateur compress --values`).
* `then taught`: the same with 64 windows, and then the pruned model teaches it for one epoch of
  that text, on its grid.
* `auto-round`: the pruned model, rounded by the rival with 20 iterations (`rival_rounding.py`).
* `joint`: pruned and rounded in one solution, from the dense model.
* `dense`: the dense model, rounded with calibration text: GPTQ alone, without zeros.
* `best`, `best joint`: the preset `best` without and with bits; the model learns on its grid.

Linears are pruned by `--method`, with asymmetric fitting. Loss in nats above the dense model's.
Every finished row is kept in `results/low-bits.json` at once, and skipped when it is there. Times
are not compared: other work ran on the machine.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows

import secateur

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/support"))
from trained import save_trained, source_text

MEASURES = ("src/secateur/quantization", "src/secateur/sparsity/solvers")
MINUTES = 150

COLUMNS: dict[str, tuple[str, dict[str, int]]] = {
    "50 % + int8": ("unstructured", {"bits": 8}),
    "50 % + int4, groups of 32": ("unstructured", {"bits": 4, "group": 32}),
    "50 % + int4, groups of 64": ("unstructured", {"bits": 4, "group": 64}),
    "50 % + int4, groups of 128": ("unstructured", {"bits": 4, "group": 128}),
    "50 % + int3, groups of 64": ("unstructured", {"bits": 3, "group": 64}),
    "2:4 + int4, groups of 64": ("2:4", {"bits": 4, "group": 64}),
}
ROWS = ("pruned", "nearest", "auto-round", "then", "then taught", "joint", "dense", "best",
        "best joint")  # fmt: skip
WRITE = {
    "not rounded": ("llama/alps",), "pruned": ("llama/alps", "llama/asymmetric"),
    "nearest": ("llama/alps", "llama/asymmetric", "llama/int4"),
    "joint": ("llama/joint", "llama/alps", "llama/asymmetric"),
}  # fmt: skip
"""What writes weights as a row does, in `same_bytes.yaml`; without these, all of them."""
SEARCH = {"alps": {"iterations": 15, "growth": 1.6}, "sparsegpt": {}}
BEST = {"iterations": 30, "growth": 1.3}


def proof(row: dict[str, Any]) -> tuple[str, ...]:
    """The command lines that write weights as a row does."""
    return WRITE.get(row["row"], ("llama/alps", "llama/best", "llama/linears alone"))


class Bench:
    """The runs on one model.

    Args:
        args: of the command line.
        scratch: a folder for models; what is there already is not made again.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.model, self.calibration, self.text = args.model, args.calibration, args.text
        self.length, self.samples, self.judged, self.windows = 512, (20, 16), 512, args.windows
        self.taught = 64
        if args.model == "trained":
            self.model = str(scratch / "dense")
            if not Path(self.model).exists():
                save_trained(Path(self.model))
            self.calibration, self.text = scratch / "seen.txt", scratch / "held-out.txt"
            self.calibration.write_text(source_text())
            self.text.write_text(source_text(held_out=True))
            self.length, self.samples, self.judged, self.windows = 64, (256, 256), 64, 256
            self.taught = 256
        if args.model == "smollm2":
            self.model = "smollm2-135m"

    def run(self, name: str, model: str | Path, **options: Any) -> Path:
        """A run that prunes, rounds or both."""
        made = self.scratch / name
        if not made.exists():
            secateur.prune(
                model, output=made, resume=True, calibration=self.calibration,
                sequence_length=self.length, asymmetric=True, fast_matmuls=True,
                **{"windows": self.samples[str(model) != self.model], **options},
            )  # fmt: skip
        return made

    def pruned(self, pattern: str) -> Path:
        """The pruned model that is not rounded."""
        name = f"pruned-{pattern}".replace(":", "-")
        return self.run(name, self.model, **self.method(pattern, {}))

    def method(self, pattern: str, bits: dict[str, int]) -> dict[str, Any]:
        """The options that prune, and round with bits."""
        parameters = {**SEARCH[self.args.method], **bits}
        return {"method": self.args.method, "method_parameters": parameters, "pattern": pattern,
                "sparsity": None if ":" in pattern else 0.5}  # fmt: skip

    def made(self, row: str, column: str) -> Path | str:
        """The model of a cell."""
        pattern, bits = COLUMNS[column]
        name = f"{row}-{column}".replace(" ", "-").replace(":", "-").replace("%", "")
        if row == "pruned":
            return self.pruned(pattern)
        if row == "joint":
            return self.run(name, self.model, **self.method(pattern, bits))
        if row in ("best", "best joint"):
            given = {**BEST, **(bits if row == "best joint" else {})}
            return self.run(name, self.model, **self.method(pattern, {}) | {
                "effort": "best", "method": "alps", "method_parameters": given})  # fmt: skip
        held = {"score": "kept", "solver": "obs", "scope": "layer", "method_parameters": bits}
        if row == "dense":
            return self.run(name, self.model, sparsity=0.0, **held)
        if row == "auto-round":
            return self.rival(self.pruned(pattern), self.scratch / name)
        if row in ("then", "then taught"):
            learning = {"distill_epochs": 1, "windows": self.taught} if row == "then taught" else {}
            return self.run(name, self.pruned(pattern), sparsity=0.5, **held, **learning)
        made = self.scratch / name
        if not made.exists():
            packed = self.scratch / f"{name}-packed"
            values, group = f"int{bits['bits']}", bits.get("group")
            secateur.compress(self.pruned(pattern), output=packed, values=values, group_size=group,
                              embeddings="keep", overwrite=True)  # fmt: skip
            secateur.decompress(packed, output=made)
        return made

    def rival(self, pruned: Path, made: Path) -> Path:
        """The pruned model, rounded to 4 bits in groups of 64 by auto-round."""
        if not made.exists():
            script = Path(__file__).parents[1] / "rivals/rival_rounding.py"
            words = [self.args.rival, script, pruned, self.args.rival_windows, made]
            subprocess.run(list(map(str, words)), check=True)
        return made

    def loss(self, model: Path | str) -> float:
        """Nats per token on the judged text."""
        judged = secateur.evaluate(
            model, text=self.text, sequence_length=self.judged, windows=self.windows
        )
        return math.log(judged.perplexity)


def lost_zeros(before: Path, after: Path) -> int:
    """How many zeros of the decoder's matrices of one folder are not zero in another."""
    from secateur.models.checkpoint import CheckpointReader

    one, two = CheckpointReader(before), CheckpointReader(after)
    names = [name for name in one.entries if "layers." in name and name.endswith("proj.weight")]
    return sum(int((two.read(name)[one.read(name) == 0] != 0).sum()) for name in names)


def table(rows: list[dict[str, Any]], model: str) -> str:
    """Nats above the dense model, by row and column."""
    own = {(r["row"], r["column"]): r["loss"] for r in rows if r["model"] == model}
    dense = own["not rounded", ""]
    columns = [c for c in COLUMNS if any(key[1] == c for key in own)]
    lines = [
        [row, *(f"{own[row, c] - dense:.3f}" if (row, c) in own else "" for c in columns)]
        for row in ROWS
        if any(key[0] == row for key in own)
    ]
    return f"{model}: dense {dense:.3f} nats\n" + markdown(["", *columns], lines)


def together(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Nats above the dense model: pruned, then rounded, or both in one solution."""
    of = {row["row"]: row["loss"] for row in rows if row["model"] == "smollm2"}
    names = {"pruned": "pruned, not rounded", "then": "then rounded with text",
             "joint": "pruned and rounded together"}  # fmt: skip
    lines = [[shown, f"{of[row] - of['not rounded']:.3f}"] for row, shown in names.items()]
    return ["50 % zeros, int4 in groups of 64", "nats above dense"], lines


TABLES = {"together": together}


def main() -> None:
    """Fill the table, as far as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="trained", choices=["trained", "smollm2"])
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--method", default="alps", choices=[*SEARCH])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[*ROWS])
    parser.add_argument("--columns", nargs="*", default=[*COLUMNS])
    parser.add_argument("--keep", type=Path, help="an existing folder for models")
    parser.add_argument("--rival", type=Path, help="a Python with auto-round")
    parser.add_argument("--rival-windows", type=Path, help="safetensors with its windows")
    args = parser.parse_args()
    if args.rival is None:
        args.only = [row for row in args.only if row != "auto-round"]
    print(heading())

    def known(row: str, column: str) -> bool:
        return any(
            (r["model"], r["row"], r["column"]) == (args.model, row, column)
            for r in known_rows("low-bits")
        )

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, args.keep or Path(temporary))
        protocol = {"judged": "see benchmarks/quality/low_bits.py", "loss": "nats per token"}
        setup = {"model": args.model, "method": args.method, "samples": list(bench.samples),
                "windows": bench.windows}  # fmt: skip
        if not known("not rounded", ""):
            found = {"row": "not rounded", "column": "", "loss": bench.loss(bench.model)}
            add("low-bits", protocol, {**setup, **found})
        for column, row in ((c, r) for c in args.columns for r in args.only):
            if known(row, column):
                continue
            made = bench.made(row, column)
            found = {"row": row, "column": column, "loss": bench.loss(made)}
            if row in ("then", "then taught", "nearest", "auto-round"):
                found["lost_zeros"] = lost_zeros(bench.pruned(COLUMNS[column][0]), Path(made))
            add("low-bits", protocol, {**setup, **found})
            print(found, flush=True)
    print(table(known_rows("low-bits"), args.model))


if __name__ == "__main__":
    main()
