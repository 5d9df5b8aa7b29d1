"""`secateur fit` beside what people take instead: llama.cpp's files, auto-round, one level of ours.

    python -m benchmarks.quality.fit MODEL --calibration C4 --wiki WIKI --work DIR
        [--make llama.cpp auto-round secateur fit] [--fit LABEL=FOLDER ...] [--sizes 60 75]

Every contender becomes float32 weights, and the same evaluation judges all: the loss of the next
token, in nats above the dense model's, on windows of 512 tokens (`--judged`, 16 of them) of
WikiText-2's validation part. All are calibrated with 64 windows of 512 tokens of C4.

* `llama.cpp TYPE`: its own quantizer, with an importance matrix of these windows. `types` has what
  the matrices really are: a row that is no multiple of 256 weights long gets another type. Bytes
  are those of the tensors; `file` is the whole file, with the vocabulary.
* `auto-round BITS gGROUP`: `rival_rounding.py`, run by the Python given with `--auto-round`. Bytes
  are bits, a float16 scale and, if not symmetric, a zero point for each group; everything else in
  bfloat16. The same again with the embedding counted as int8, but judged unrounded: kinder than it
  can be.
* `secateur VALUES, embeddings VALUES`: `secateur compress` with calibration, one level for all.
* `fit SIZE`: `secateur fit --max-size SIZE`, and its best candidate before healing;
  `--fit LABEL=FOLDER` is a folder that it has made. With `--for llama.cpp` also its GGUF file.
  `memory` is the most that the process had resident until then, mapped files of weights included.

Every finished row is kept at once; a row that is there is not made again. The source of SmolLM2 is
a 4-bit file (Q4_1), so its dense weights have only 16 values in a group of 32.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.hardware import add, heading, watched_memory
from benchmarks.quality.judged import arguments, windows_of
from benchmarks.rivals.llama_types import TYPES, LlamaFiles, types_of
from benchmarks.stored import known_rows
from torch import Tensor
from torch.nn import functional

import secateur
from secateur.models.sources import resolve
from secateur.steps.fitting.bench import FitBench, best_of

MEASURES = ("src/secateur/steps/fit.py", "src/secateur/steps/fitting", "src/secateur/quantization")
PROOF = ("llama/fit", "llama/loss fit")
MINUTES = 270

TABLE = "fit-rivals"


def ours(row: dict[str, Any]) -> bool:
    """Whether our code has made the model of a row."""
    return row["contender"].startswith(("fit", "secateur"))


PROTOCOL = {"judged": "excess loss in nats; see benchmarks/quality/fit.py"}
MIB = 2**20

GRIDS = ("2/32", "3/64", "4/64", "2/32/asymmetric", "2/64", "3/32", "4/32")
"""auto-round's bits and group. Its default is symmetric."""

LEVELS = (("int2", "int4"), ("int3", "int4"), ("int4", "int4"), ("int3", "int8"), ("int4", "int8"),
          ("int8", "int8"))  # fmt: skip
"""Values and embeddings of `secateur compress`."""


@dataclass
class Bench:
    """One model, its texts, and the rows that it has.

    Attributes:
        name: of the model, in the table.
        source: the folder of the dense model.
        args: the command line.
    """

    name: str
    source: Path
    args: argparse.Namespace

    @property
    def work(self) -> Path:
        """Where this model's files are."""
        return Path(self.args.work / self.name)

    def windows(self, text: Path, count: int) -> Tensor:
        """The same windows for all contenders."""
        return windows_of(self.source, text, count, self.work)

    @cached_property
    def judged(self) -> dict[str, Tensor]:
        """The texts that judge."""
        return {"wiki": self.windows(self.args.wiki, self.args.judged)}

    def known(self, contender: str) -> dict[str, Any] | None:
        """The row of a contender."""
        rows = (r for r in known_rows(TABLE) if r["model"] == self.name)
        return next((r for r in rows if r["contender"] == contender), None)

    @cached_property
    def dense(self) -> dict[str, Any]:
        """The row of the dense model, in bfloat16."""
        row = self.known("dense")
        if row is None:
            module = secateur.load(self.source, dtype=torch.float32, expand=True)
            weights = sum(x.numel() for x in module.parameters())
            losses = self.losses(module)
            row = {"model": self.name, "contender": "dense", "bytes": 2 * weights,
                   "weights": weights, "windows": self.args.judged, **losses}  # fmt: skip
            add(TABLE, PROTOCOL, row)
            print(row, flush=True)
        return row

    @torch.no_grad()
    def losses(self, module: Any) -> dict[str, float]:
        """The mean loss of the next token in nats on each text."""
        found = {}
        for text, windows in self.judged.items():
            losses = []
            for rows in windows.split(2):
                logits = module(input_ids=rows, use_cache=False).logits[:, :-1]
                losses.append(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
            found[text] = float(torch.stack(losses).mean())
        return found

    def keep(self, contender: str, folder: Path, size: int, **values: Any) -> None:
        """Judge a folder, and keep its row."""
        dense = self.dense
        losses = self.losses(secateur.load(folder, dtype=torch.float32, expand=True))
        excess = {text: loss - dense[text] for text, loss in losses.items()}
        bits = 8 * size / dense["weights"]
        row = {"model": self.name, "contender": contender, "bytes": size, "bits": bits, **excess}
        add(TABLE, PROTOCOL, {**row, **values})
        print({**row, **values}, flush=True)

    def by_llama_cpp(self) -> None:
        """A row for each type of llama.cpp."""
        for kind in self.args.types:
            if self.known(f"llama.cpp {kind}"):
                continue
            llama = LlamaFiles.prepare(self.source, self.calibration, self.work)
            file, begun = self.work / f"{kind}.gguf", time.perf_counter()
            if not file.exists():
                llama.mix(kind, file)
            self.keep_gguf(f"llama.cpp {kind}", file, seconds=time.perf_counter() - begun)

    def keep_gguf(self, contender: str, file: Path, **values: Any) -> None:
        """The row of a GGUF file, read back."""
        types, size = types_of(file)
        folder = resolve(str(file), dtype="float32").folder
        # transformers reads neither the pattern of Gemma's windows nor its scale from GGUF
        shutil.copy(self.source / "config.json", folder)
        self.keep(contender, folder, size, file=file.stat().st_size, types=types, **values)
        shutil.rmtree(folder)  # in the cache

    @cached_property
    def calibration(self) -> Tensor:
        """The windows that calibrate."""
        return self.windows(self.args.calibration, 64)

    def by_auto_round(self) -> None:
        """Two rows for each grid of auto-round: its own embedding, and one counted as int8."""
        for bits, group, *asymmetric in (grid.split("/") for grid in self.args.grids):
            label = " ".join([f"auto-round {bits} bits g{group}", *asymmetric])
            folder = self.work / label.replace(" ", "-")
            if self.known(label) or self.args.auto_round is None:
                continue
            assert len(self.calibration)
            windows = self.work / f"{self.args.calibration.name}-64.safetensors"
            words = [*shlex.split(self.args.auto_round), "benchmarks/rivals/rival_rounding.py"]
            words += [self.source, windows, folder, "--bits", bits, "--group-size", group]
            words += ["--samples", 64, "--recipe", self.args.recipe]
            words += [f"--{word}" for word in asymmetric]
            subprocess.run([str(x) for x in words], check=True)
            facts = json.loads((folder / "rival.json").read_text(encoding="utf-8"))
            sizes = facts.pop("bytes"), facts.pop("bytes_int8_embedding")
            self.keep(label, folder, sizes[0], **facts, kinder=sizes[1])
            shutil.rmtree(folder)

    def by_compress(self) -> None:
        """A row for each single level of ours."""
        for values, embeddings in self.args.levels:
            label = f"secateur {values}, embeddings {embeddings}"
            if self.known(label):
                continue
            folder, begun = self.work / f"{values}-{embeddings}", time.perf_counter()
            secateur.compress(
                self.source, values=values, embeddings=embeddings, output=folder, overwrite=True,
                calibration=str(self.args.calibration), windows=64, sequence_length=512,
            )  # fmt: skip
            self.keep(label, folder, size_of(folder), seconds=time.perf_counter() - begun)
            shutil.rmtree(folder)

    @property
    def sizes(self) -> list[float]:
        """The sizes that are compared, in bytes."""
        weights = self.dense["weights"]
        return [x * MIB for x in self.args.sizes or ()] or [weights * x / 8 for x in self.args.bits]

    def by_fit(self) -> None:
        """Two rows for each size: the best candidate before healing, and the result."""
        for size in self.sizes:
            label = f"fit {size / MIB:.2f} MiB"
            label += f" for {self.args.target}" if self.args.target != "cpu" else ""
            last = f"{label}, {'not healed' if self.args.heal_tokens == 0 else 'healed'}"
            if self.known(last):
                continue
            folder, begun = self.work / label.replace(" ", "-"), time.perf_counter()
            with (
                watched_memory() as memory,
                self.judging_before_healing(f"{label}, not healed", memory) as judging,
            ):
                found = secateur.fit(
                    self.source, max_size=int(size), calibration=str(self.args.calibration),
                    windows=64, sequence_length=512, output=folder, resume=True,
                    target=self.args.target, heal_tokens=self.args.heal_tokens,
                )  # fmt: skip
            rows = [asdict(row) for row in found.finalists]
            seconds = time.perf_counter() - begun - sum(judging)
            self.keep_fit(last, folder, seconds=seconds, memory=max(memory), finalists=rows)

    @contextmanager
    def judging_before_healing(self, label: str, memory: list[int]) -> Iterator[list[float]]:
        """Keep the row of the best candidate of a fit before it is healed.

        Args:
            label: of the row.
            memory: the resident bytes that were seen so far.

        Yields:
            The seconds that this has taken.
        """
        begun, taken = time.perf_counter(), list[float]()

        healed = FitBench.healed

        def heal(bench: FitBench, candidates: Any) -> Any:
            judged, best, most = time.perf_counter(), best_of(candidates), max(memory)
            if not self.known(label):
                cost = {"seconds": judged - begun, "memory": most}
                self.keep(label, best.packed, best.row.file_bytes, **cost)
            taken.append(time.perf_counter() - judged)
            return healed(bench, candidates)

        with mock.patch.object(FitBench, "healed", heal):
            yield taken

    def by_folders(self) -> None:
        """A row for each folder that is given."""
        for label, path in (x.split("=", 1) for x in self.args.fit):
            self.keep_fit(f"fit {label}", Path(path))

    def keep_fit(self, label: str, folder: Path, **values: Any) -> None:
        """The row of a fit, and that of its GGUF file."""
        if not self.known(label):
            self.keep(label, folder, size_of(folder), **values)
        for file in folder.rglob("*.gguf"):
            if not self.known(f"{label}, GGUF"):
                self.keep_gguf(f"{label}, GGUF", file)


def size_of(folder: Path) -> int:
    """The bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def smollm2(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """SmolLM2: every file, smallest first; an embedding that nobody rounds counts as int8."""
    own = [r for r in rows if r["model"] == "SmolLM2-135M"]
    weights = next(r["weights"] for r in own if "weights" in r)
    shown = [(r.get("kinder", r["bytes"]), r) for r in own if r["contender"] != "dense"]
    lines = [
        [
            f"**{r['contender']}**" if r["contender"].startswith("fit") else r["contender"],
            f"{size / MIB:.1f}",
            f"{8 * size / weights:.1f}",
            f"{r['wiki']:.3f}",
        ]
        for size, r in sorted(shown, key=lambda pair: pair[0])
    ]
    return ["", "MiB", "bits", "WikiText-2"], lines


TABLES = {"smollm2": smollm2}


def main() -> None:
    """Fill the table."""
    parser = arguments(__doc__, 16, "wiki")
    parser.add_argument("--sizes", type=float, nargs="*", help="MiB")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.2, 2.6, 3.2, 4.5, 8])
    contenders = ["llama.cpp", "auto-round", "secateur", "fit"]
    parser.add_argument("--make", nargs="*", default=contenders, choices=contenders)
    parser.add_argument("--types", nargs="*", default=[*TYPES], choices=[*TYPES])
    parser.add_argument("--levels", nargs="*", type=lambda x: x.split("/"), default=[*LEVELS])
    parser.add_argument("--auto-round", help="a Python that has it, with its words")
    parser.add_argument("--grids", nargs="*", default=[*GRIDS])
    parser.add_argument(
        "--recipe", default="default", choices=["default", "light", "short", "opt_rtn"]
    )
    parser.add_argument("--fit", nargs="*", default=[], metavar="LABEL=FOLDER")
    parser.add_argument("--heal-tokens", type=int, help="of the fits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--for", dest="target", default="cpu", help="target of the fits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(heading())
    bench = Bench(args.name or Path(args.model).name, resolve(args.model).folder, args)
    bench.work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], None]] = {
        "llama.cpp": bench.by_llama_cpp, "auto-round": bench.by_auto_round,
        "secateur": bench.by_compress, "fit": bench.by_fit,
    }  # fmt: skip
    for contender in args.make:
        made[contender]()
    bench.by_folders()


if __name__ == "__main__":
    main()
