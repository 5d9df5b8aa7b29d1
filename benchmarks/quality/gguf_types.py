"""GGUF files of equal types and of equal sizes, ours beside llama.cpp's, by loss and divergence.

    python -m benchmarks.quality.gguf_types MODEL --calibration C4 --c4 HELD_OUT --wiki WIKI --work DIR
        [--make pure mixes auto-round types healed fit like] [--files LABEL=FILE ...] [--first 8]
        [--publish]

Every contender is a GGUF file. It is read back to float32, and one judge compares all with the dense
model on windows of 512 tokens (`--judged`, 32 of them) of WikiText-2's validation part and of C4 that
nobody calibrated on: the loss in nats above the dense model's, the divergence from it, and how often
both choose the same token. Errors are standard errors over windows, of the differences from the
dense model. All are calibrated with the same 64 windows of 512 tokens.

* `llama.cpp pure TYPE`: one type throughout, with an importance matrix of these windows, also for the
  embedding.
* `llama.cpp MIX`: what people download: the quantizer's own choice of a type for each matrix.
* `auto-round MIX`: its own writer of these mixes (`rival_rounding.py --gguf`), without iterations, as
  its documentation advises for GGUF, run by the Python given with `--auto-round`.
* `secateur TYPE`: `secateur compress --to gguf --values TYPE`, and `healed`: `secateur fit --like` on
  the file of one type by llama.cpp.
* `fit SIZE`: `secateur fit --target llama.cpp --max-size SIZE`.
* `like MIX`: `secateur fit --like` on llama.cpp's file. What it refuses is printed and has no row.

Bytes are those of the tensors; `file` is the whole file. `types` has what the matrices really are.
`llama.cpp` has what its own logits give on the first window of each text, as a check of the reader; it
rounds the inputs of each product to 8 bits, which the judge does not.
What each window gave is kept in `DIR/NAME/rows` at once; `--first` judges only so many windows of
each text, and a later run goes on from there. `--publish` writes the result.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.hardware import heading, keep, markdown
from benchmarks.quality.judged import MEASURES as MEASURED
from benchmarks.quality.judged import Judge, arguments, logits_of, windows_of
from benchmarks.rivals.llama_types import PURE, TYPES, LlamaFiles, types_of
from benchmarks.stored import alone, known_rows
from torch import Tensor

import secateur
from secateur.errors import VerificationError
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import resolve

MEASURES = (
    "src/secateur/quantization",
    "src/secateur/steps/fitting",
    "src/secateur/exporting/gguf",
)
PROOF = ("llama/gguf q4_0", "llama/gguf rounded", "llama/gguf fit")
MINUTES = 95


def ours(row: dict[str, Any]) -> bool:
    """Whether our code has made the file of a row."""
    return not row["contender"].startswith("llama.cpp")


TABLE = "gguf-types"
PROTOCOL = {"judged": "see benchmarks/quality/gguf_types.py"}
TEXTS = ("wiki", "c4")
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M")
"""The files that `--like` improves."""


class Bench:
    """One model, its texts, and the files that it has.

    Args:
        source: the folder of the dense model.
        name: of the model, in the table.
        args: the command line.
    """

    def __init__(self, source: Path, name: str, args: argparse.Namespace) -> None:
        self.source, self.name, self.args = source, name, args
        self.work = Path(args.work) / name
        for folder in ("files", "rows"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)

    def windows(self, text: Path, count: int) -> Tensor:
        """The windows of a text."""
        return windows_of(self.source, text, count, self.work)

    @cached_property
    def judge(self) -> Judge:
        """The judge of all contenders."""
        texts = {x: self.windows(getattr(self.args, x), self.args.judged) for x in TEXTS}
        return Judge(self.source, texts, self.work)

    @cached_property
    def model(self) -> Any:
        """A model that takes the weights of each contender in turn."""
        return secateur.load(self.source, dtype=torch.float32, expand=True).eval()

    @cached_property
    def llama(self) -> LlamaFiles:
        """llama.cpp's quantizer for this model."""
        return LlamaFiles.prepare(self.source, self.windows(self.args.calibration, 64), self.work)

    def keep(self, contender: str, make: Callable[[Path], Any]) -> None:
        """Make a file unless it is there, and judge it on the windows that it lacks."""
        stem = contender.replace(" ", "-")
        file, known = self.work / f"files/{stem}.gguf", self.work / f"rows/{stem}.json"
        row = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
        count = self.args.first or self.args.judged
        if "refused" in row:
            print(contender, "refused:", row["refused"], flush=True)
            return
        if row and min(len(row[text]) for text in TEXTS) >= count:
            return
        if not file.exists():
            begun = time.process_time()
            try:
                make(file)
            except VerificationError as error:
                known.write_text(json.dumps({"refused": str(error)}) + "\n", encoding="utf-8")
                return self.keep(contender, make)
            row["cpu_seconds"] = time.process_time() - begun
        if "bytes" not in row:
            types, size = types_of(file)
            row |= {"contender": contender, "bytes": size, "file": file.stat().st_size}
            row |= {"types": types} | {text: [] for text in TEXTS}
        self.model.load_state_dict(weights_of(file))
        logits = partial(logits_of, self.model)
        for text in TEXTS:
            row[text] += self.judge.measured(logits, text, len(row[text]), count)
        if "llama.cpp" not in row:
            row["llama.cpp"] = self.by_llama_cpp(file)
        unfinished = known.with_suffix(".partial")
        unfinished.write_text(json.dumps(row) + "\n", encoding="utf-8")
        unfinished.rename(known)
        print(contender, f"{row['bytes']:,}", *summary(row, self.dense(count)).items(), flush=True)

    def by_llama_cpp(self, file: Path) -> dict[str, list[float]]:
        """The measures of the first window of each text with llama.cpp's own logits."""
        with LlamaCpp(file) as engine:

            def logits(ids: Tensor) -> Tensor:
                return next(x for x in engine.run(ids[None], logits=True) if x is not None)

            return {text: next(self.judge.measured(logits, text, 0, 1)) for text in TEXTS}

    def dense(self, count: int) -> dict[str, Any]:
        """What the dense model gives on the same windows."""
        file = self.work / "dense.json"
        row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for text in TEXTS:
            known = row.setdefault(text, [])
            logits = partial(logits_of, self.judge.dense)
            known += self.judge.measured(logits, text, len(known), count)
        row["weights"] = sum(x.numel() for x in self.judge.dense.parameters())
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """A summary of each contender, smallest file first."""
        files = (self.work / "rows").glob("*.json")
        found = [x for x in (json.loads(y.read_text("utf-8")) for y in files) if "bytes" in x]
        dense = self.dense(max((len(row[text]) for row in found for text in TEXTS), default=0))
        for row in sorted(found, key=lambda row: row["bytes"]):
            bits = 8 * row["bytes"] / dense["weights"]
            own = {key: value for key, value in row.items() if key not in TEXTS}
            yield {"model": self.name, **own, "bits": bits, **summary(row, dense)}

    def pure(self) -> None:
        """llama.cpp's files of one type."""
        for kind in self.args.pure:
            self.keep(f"llama.cpp pure {kind}", lambda file, kind=kind: self.llama.pure(kind, file))

    def mixes(self) -> None:
        """llama.cpp's mixes."""
        for kind in self.args.mixes:
            self.keep(f"llama.cpp {kind}", lambda file, kind=kind: self.llama.mix(kind, file))

    def auto_round(self) -> None:
        """auto-round's mixes."""
        windows = self.work / f"{self.args.calibration.name}-64.safetensors"
        for kind in self.args.rounded:
            words = [*shlex.split(self.args.auto_round), "-m", "benchmarks.rivals.rival_rounding"]
            output = self.work / f"files/auto-round-{kind}"
            words += [str(self.source), str(windows), str(output), "--gguf", kind.lower()]
            words += ["--recipe", "opt_rtn", "--samples", "64"]

            def make(file: Path, words: list[str] = words, output: Path = output) -> None:
                subprocess.run(words, check=True)
                _take(output, file)

            self.keep(f"auto-round {kind}", make)

    def types(self) -> None:
        """Ours of one type."""
        for kind in self.args.types:
            self.keep(
                f"secateur {kind}",
                self.folder(
                    secateur.compress, values=kind.lower(), embeddings=kind.lower(), to="gguf"
                ),
            )

    def healed(self) -> None:
        """Ours of one type, healed."""
        for kind in self.args.types:
            like = self.work / f"files/llama.cpp-pure-{kind}.gguf"
            self.keep(f"secateur {kind} healed", self.folder(secateur.fit, like=like, **self.heal))

    def like(self) -> None:
        """Files with the types of a mix."""
        for kind in MIXES:
            like = self.work / f"files/llama.cpp-{kind}.gguf"
            self.keep(f"like {kind}", self.folder(secateur.fit, like=like, **self.heal))

    def fit(self) -> None:
        """Files of a size."""
        weights = self.dense(0)["weights"]
        for bits in self.args.bits:
            options = {"max_size": int(weights * bits / 8), "target": "llama.cpp"}
            self.keep(f"fit {bits} bits", self.folder(secateur.fit, **options, **self.heal))

    @property
    def heal(self) -> dict[str, Any]:
        """How much a fit heals."""
        return {"heal_tokens": self.args.heal_tokens}

    def folder(self, command: Callable[..., Any], **options: Any) -> Callable[[Path], None]:
        """What makes a file by one of our commands."""

        def make(file: Path) -> None:
            output = file.with_suffix("")
            command(
                self.source, output=output, resume=True, calibration=str(self.args.calibration),
                windows=64, sequence_length=512, **options,
            )  # fmt: skip
            _take(output, file)

        return make

    def files(self) -> None:
        """Files that are given."""
        for label, path in (x.split("=", 1) for x in self.args.files):
            self.keep(label, lambda file, path=path: shutil.copy(path, file))


def _take(folder: Path, file: Path) -> None:
    """Keep the one GGUF file of a folder, and nothing else."""
    (made,) = folder.rglob("*.gguf")
    made.rename(file)
    shutil.rmtree(folder)


def weights_of(file: Path) -> dict[str, Tensor]:
    """The weights in a GGUF file, by transformers' names.

    transformers reads neither the pattern of Gemma's windows nor its scale from GGUF, so the model
    itself comes from the source.
    """
    options = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet_transformers(), redirect_stderr(io.StringIO()):  # it draws a bar
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    return dict(read.state_dict())


def summary(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard error over windows of each measure, for each text; of losses, the excess."""
    found: dict[str, Any] = {}
    for text in TEXTS:
        values = torch.tensor(row[text], dtype=torch.float64)
        values[:, 0] -= torch.tensor(dense[text], dtype=torch.float64)[: len(values), 0]
        errors = values.std(0) / math.sqrt(len(values))
        found[text] = dict(zip(MEASURED, values.mean(0).tolist(), strict=True))
        found[f"{text}_error"] = dict(zip(MEASURED, errors.tolist(), strict=True))
        found["windows"] = len(values)
    return found


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Every file, smallest first."""
    lines = [
        [
            row["contender"],
            f"{row['bits']:.2f}",
            *(f"{row[text]['loss']:.4f} ± {row[f'{text}_error']['loss']:.4f}" for text in TEXTS),
            *(f"{row[text]['divergence']:.4f}" for text in TEXTS),
            *(f"{row[text]['agreement']:.1%}" for text in TEXTS),
        ]
        for row in rows
    ]
    columns = [
        "",
        "bits",
        "loss, WikiText-2",
        "C4",
        "divergence, WikiText-2",
        "C4",
        "same token",
        "C4",
    ]
    return columns, lines


def ratios(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What our files of one type lose, as a share of what llama.cpp's loses."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        known = {row["contender"]: row for row in rows if row["model"] == model}
        for kind in PURE:
            rival = known.get(f"llama.cpp pure {kind}")
            for label in (f"secateur {kind}", f"secateur {kind} healed"):
                if rival is None or label not in known:
                    continue
                shares = (
                    known[label][text][measure] / rival[text][measure]
                    for measure in MEASURED[:2]
                    for text in TEXTS
                )
                size = known[label]["bytes"] / rival["bytes"]
                lines.append([model, label, *(f"{x:.2f}" for x in shares), f"{size:.3f}"])
    columns = ["model", "", "loss, WikiText-2", "C4", "divergence, WikiText-2", "C4", "bytes"]
    return columns, lines


def shown(model: str) -> Callable[[list[dict[str, Any]]], tuple[list[str], list[list[str]]]]:
    """The table of one model."""
    return lambda rows: table([row for row in rows if row["model"] == model])


MODELS = ("smollm2-768", "wide-qwen", "wide-gemma", "smollm2-135m")


def readme(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A fit beside llama.cpp's files of its size and of its quality, on WikiText-2."""
    known = {row["contender"]: row for row in rows if row["model"] == "smollm2-768"}
    lines = []
    for label, name in FIRST.items():
        judged, size = known[name]["wiki"], known[name]["file"] / 2**20
        numbers = (f"{size:.1f}", f"{judged['divergence']:.2f}", f"{judged['agreement']:.0%}")
        lines.append([label, *numbers])
    return ["", "MiB", "divergence", "same next token"], lines


FIRST = {
    "llama.cpp, Q3_K throughout": "llama.cpp pure Q3_K",
    "**`fit`**": "fit 3.5 bits",
    "llama.cpp, Q3_K_M": "llama.cpp Q3_K_M",
}
TABLES = {"readme": readme, "ratios": ratios, **{name: shown(name) for name in MODELS}}


def main() -> None:
    """Fill the table."""
    parser = arguments(__doc__, 32, "c4", "wiki")
    parser.add_argument("--first", type=int, help="judge so many of them now")
    makes = ("pure", "mixes", "auto-round", "types", "healed", "fit", "like", "files")
    parser.add_argument("--make", nargs="*", default=makes, choices=makes)
    parser.add_argument("--auto-round", default="", help="a Python that has it, with its words")
    rounded = ["Q2_K_S", "Q3_K_S", "Q4_K_S", "Q4_K_M"]
    parser.add_argument("--rounded", nargs="*", default=rounded, help="mixes of auto-round")
    parser.add_argument("--heal-tokens", type=int, help="of the fits")
    parser.add_argument("--pure", nargs="*", default=[*PURE], choices=[*PURE])
    parser.add_argument("--mixes", nargs="*", default=[*TYPES], choices=[*TYPES])
    ours = ["Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"]
    parser.add_argument("--types", nargs="*", default=ours, choices=[*PURE])
    parser.add_argument("--bits", type=float, nargs="*", default=[2.3, 2.8, 3.5, 4.5, 6.6])
    parser.add_argument("--files", nargs="*", default=[], metavar="LABEL=FILE")
    parser.add_argument("--publish", action="store_true", help="write the result")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(heading())
    source = resolve(args.model).folder
    bench = Bench(source, args.name or Path(args.model).name, args)
    for made in args.make:
        getattr(bench, made.replace("-", "_"))()
    rows = list(bench.rows())
    print(markdown(*table(rows)), markdown(*ratios(rows)), sep="\n\n")
    if args.publish:
        with alone():
            others = [row for row in known_rows(TABLE) if row["model"] != bench.name]
            keep(TABLE, PROTOCOL, [*others, *rows])


if __name__ == "__main__":
    main()
