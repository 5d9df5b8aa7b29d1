"""What a mixture loses with its experts: by every score, tuned, beside neurons and fewer bits.

    python -m benchmarks.quality.experts --work DIR
    python -m benchmarks.quality.experts --work DIR --smollm2 FOLDER --calibration C4.jsonl --c4 … --wiki …
    python -m benchmarks.quality.experts --work DIR --models mixture-0 --ways 'reap*' --kept 0.5

`mixture-0` to `mixture-2` are those of `tests/support/mixtures.py`, which are trained here: four
layers of 16 experts, four for a token, that read code, prose and records letter by letter.
Calibration is 128 windows of 64 letters of each kind, from the files that were trained on; judged
are windows of held-out files. `smollm2` is the folder that `benchmarks.models.smollm2_mixture`
wrote. Methods are tuned on `mixture-0` and `mixture-1`; the others judge.

A cell is a cut by `secateur.structure` with the options of its way. Loss is that of the next token,
above the uncut mixture's on the same windows, so its error is that of the differences of windows;
divergence is from the uncut mixture; both in nats. `random` is the mean of five draws. Neurons go
in every expert, as many weights as whole experts have; `experts and neurons` takes both. Ways with
`llama.cpp` choose in a float32 GGUF file by what llama.cpp computes, or by an importance matrix
that it has collected, and llama.cpp judges them. The ways of `bits` cut by
`divergence`, global and tuned, and store what is left in fewer bits, rounded on the same text;
`uncut` compares SmolLM2's mixture with SmolLM2. Every cell is kept in `results/experts.json` at once
and skipped when it is there; a killed cut goes on. DIR keeps trained models and stopped runs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from benchmarks.gguf_files.importance import collected, write
from benchmarks.hardware import add, heading, markdown
from benchmarks.quality import judged
from benchmarks.stored import known_rows
from torch import Tensor

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.sources import resolve
from secateur.recipes.structure import ExpertsBy

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))
from mixtures import save_mixture, trained_mixture, windows_of

MEASURES = (
    "src/secateur/engine/search/experts.py", "src/secateur/engine/search/expert_divergence.py",
    "src/secateur/engine/prune/routers.py", "src/secateur/exporting/gguf/expert_scores.py",
    "src/secateur/structured",
)  # fmt: skip

PROOF = tuple(
    f"mixtral/experts{way}"
    for way in (
        "", " anywhere", " tuned", " healed", " by divergence", " by norms", " at random",
        " and neurons",
    )
)  # fmt: skip
STEPS, CALIBRATION, JUDGED, DRAWS = 2000, 128, 180, 5
KEPT, BITS = (0.75, 0.5), ("int8", "int4", "int3", "int2")
MINUTES = 110
GLOBAL = ("reap", "divergence", "frequency")
"""Scores that compare layers."""
EFFORTS = {"": "fast", ", tuned": "balanced", ", healed": "thorough"}
"""What follows a cut: nothing, the tuning of what stays layer by layer, and end to end after it."""
HEALED = ("reap", "divergence", "experts and neurons")
"""The cuts that are healed too."""
CUT_BEFORE_BITS = {"experts_by": "divergence", "experts_scope": "global", "effort": "balanced"}
WHOLE = {0.75: 0.875, 0.5: 0.75}
"""The experts that stay beside fewer neurons."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A mixture, the text that chooses, and the windows that judge.

    Attributes:
        name: in the table.
        folder: its checkpoint.
        calibration: the options of the calibration text.
        texts: windows [windows, length] of each text.
        work: where its files are kept.
    """

    name: str
    folder: Path
    calibration: Options
    texts: dict[str, Tensor]
    work: Path

    @cached_property
    def judge(self) -> judged.Judge:
        """Compares with the uncut mixture."""
        return judged.Judge(self.folder, self.texts, self.work)

    @cached_property
    def uncut(self) -> Tensor:
        """The measures of the uncut mixture [windows, 3]."""
        return self.measured(partial(judged.logits_of, self.judge.dense))

    def measured(self, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """The measures of all windows [windows, 3], those of the first text first."""
        counts = {text: len(windows) for text, windows in self.texts.items()}
        found = (self.judge.measured(logits, text, 0, count) for text, count in counts.items())
        return torch.tensor([row for rows in found for row in rows], dtype=torch.float64)

    def measured_at(self, place: Path) -> Tensor:
        """Those of a folder, or of a GGUF file."""
        if place.is_dir():
            model = secateur.load(place, dtype=torch.float32, expand=True).eval()
            return self.measured(partial(judged.logits_of, model))
        with LlamaCpp(place) as engine:

            def logits(ids: Tensor) -> Tensor:
                return next(x for x in engine.run(ids[None], logits=True) if x is not None)

            return self.measured(logits)

    @cached_property
    def file(self) -> Path:
        """The mixture as a float32 GGUF file, and beside it an importance matrix."""
        place = self.work / "exported"
        if not place.exists():
            secateur.export(self.folder, to="gguf", type="f32", output=place)
            (file,) = place.glob("*.gguf")
            with LlamaCpp(file) as engine:
                windows = load_windows(Path(self.calibration["calibration"]))
                write(collected(engine, windows), self.work / "imatrix.gguf", windows.shape[1])
        (file,) = place.glob("*.gguf")
        return file


def letters(seed: int, work: Path) -> Bench:
    """A mixture that is trained here, unless it is there."""
    place = work / f"mixture-{seed}"
    folder, windows = place / "model", place / "calibration.safetensors"
    if not folder.exists():
        place.mkdir(parents=True, exist_ok=True)
        save_windows(torch.cat([*windows_of(False, CALIBRATION, seed).values()]), windows)
        save_mixture(trained_mixture(seed, STEPS), place / "partial").rename(folder)
    calibration = {"calibration": str(windows)}
    return Bench(place.name, folder, calibration, windows_of(True, JUDGED), place)


def smollm2(args: argparse.Namespace) -> Bench:
    """SmolLM2 as a mixture, and texts of 512 tokens."""
    work = args.work / "smollm2"
    work.mkdir(parents=True, exist_ok=True)
    texts = {
        name: judged.windows_of(args.smollm2, file, args.judged, work)
        for name, file in (("C4", args.c4), ("WikiText-2", args.wiki))
    }
    calibration = {
        "calibration": str(args.calibration), "windows": 32, "sequence_length": judged.LENGTH
    }  # fmt: skip
    return Bench("smollm2", args.smollm2, calibration, texts, work)


def ways() -> dict[str, Callable[[float], Options]]:
    """The options of each way, by the share of the experts' weights that stays."""
    found: dict[str, Callable[[float], Options]] = {}
    for by in get_args(ExpertsBy):
        for scope in ("layer", "global") if by in GLOBAL else ("layer",):
            if by != "imatrix":
                name = by if scope == "layer" else f"{by}, global"
                found[name] = partial(_experts, experts_by=by, experts_scope=scope)
    found |= {"neurons": lambda kept: {"ffn": kept}, "experts and neurons": _both}
    tried = {
        f"{name}{after}": partial(_with_effort, own, effort)
        for name, own in found.items()
        for after, effort in EFFORTS.items()
        if effort != "thorough" or name in HEALED
    }
    return tried | {
        "reap, llama.cpp": partial(_experts, experts_by="reap"),
        "imatrix, llama.cpp": partial(_experts, experts_by="imatrix"),
    }


def _experts(kept: float, **options: Any) -> Options:
    """A cut of whole experts."""
    return {"experts": kept, **options}


def _both(kept: float) -> Options:
    """A cut of experts, and of neurons in those that stay."""
    experts = WHOLE[kept]
    return {"experts": experts, "ffn": round(kept / experts, 6)}


def _with_effort(own: Callable[[float], Options], effort: str, kept: float) -> Options:
    """A cut with more or less tuning."""
    return {**own(kept), "effort": effort}


def cut(bench: Bench, way: str, options: Options, place: Path) -> Path:
    """The cut model: a folder or a GGUF file."""
    if way.endswith("llama.cpp"):
        file = bench.file
        if options["experts_by"] == "imatrix":
            options["imatrix"] = bench.work / "imatrix.gguf"
        else:
            options |= bench.calibration
        return secateur.structure(file, output=place.with_suffix(".gguf"), **options).output
    made = secateur.structure(
        bench.folder, output=place, resume=True, **bench.calibration, **options
    )
    return made.output


def cell(bench: Bench, way: str, kept: float, options: Options) -> dict[str, Any]:
    """One row: a cut, or the mean of several draws."""
    place, start, sums = bench.work / f"cut-{way}-{kept}".replace(", ", "-"), time.perf_counter(), 0
    seeds = range(DRAWS) if way.startswith("random") else [0]
    for seed in seeds:
        made = cut(bench, way, {**options, "seed": seed} if seed else {**options}, place)
        seconds = time.perf_counter() - start
        sums = sums + bench.measured_at(made)
        remove(made)
    return row_of(bench, sums / len(seeds)) | {
        "model": bench.name, "way": way, "kept": kept, "seconds": seconds
    }  # fmt: skip


def stored(bench: Bench, kept: float, values: str) -> dict[str, Any]:
    """One row of `bits`: the experts that stay, in fewer bits."""
    folder, place = bench.folder, bench.work / f"cut-{kept}"
    if kept < 1:
        options = {"experts": kept, **CUT_BEFORE_BITS}
        folder = cut(bench, "bits", options, place) if not place.exists() else place
    packed = bench.work / f"packed-{kept}-{values}"
    made = secateur.compress(
        folder, output=packed, values=values, group_size=None if values == "int8" else 32,
        resume=True, **bench.calibration,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in made.output.glob("*.safetensors"))
    row = row_of(bench, bench.measured_at(made.output))
    remove(packed)
    return row | {
        "model": bench.name, "way": "bits", "kept": kept, "values": values, "bytes": size
    }  # fmt: skip


def whole(bench: Bench) -> dict[str, Any]:
    """One row: the uncut mixture beside the dense model that it was made of."""
    work = bench.work / "dense"
    work.mkdir(exist_ok=True)
    dense = Bench("dense", resolve("smollm2-135m").folder, {}, bench.texts, work)
    return row_of(dense, dense.measured_at(bench.folder)) | {
        "model": bench.name, "way": "uncut", "kept": 1.0
    }  # fmt: skip


def remove(made: Path) -> None:
    """Remove a folder or a file."""
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink()


def row_of(bench: Bench, found: Tensor) -> dict[str, Any]:
    """The means over windows, and the loss above the uncut mixture's."""
    above = found[:, 0] - bench.uncut[:, 0]
    means = dict(zip(judged.MEASURES, found.mean(0).tolist(), strict=True))
    parts = above.split([len(windows) for windows in bench.texts.values()])
    return means | {
        "above": float(above.mean()), "error": float(above.std() / len(above) ** 0.5),
        "above_by_text": {n: float(x.mean()) for n, x in zip(bench.texts, parts, strict=True)},
    }  # fmt: skip


def cells(bench: Bench) -> Iterator[tuple[Mapping[str, Any], Callable[[], dict[str, Any]]]]:
    """What a row of each cell is known by, and how it is made."""
    for way, options in ways().items():
        for kept in KEPT:
            if bench.name != "smollm2" or not way.endswith("llama.cpp"):
                yield {"way": way, "kept": kept}, partial(cell, bench, way, kept, options(kept))
    if bench.name == "smollm2":
        yield {"way": "uncut", "kept": 1.0}, partial(whole, bench)
    for kept in (1.0, *KEPT):
        for values in BITS:
            named = {"way": "bits", "kept": kept, "values": values}
            yield named, partial(stored, bench, kept, values)


Rows = list[dict[str, Any]]


def lost(rows: Rows, way: str, kept: float, *, smollm2: bool) -> str:
    """The loss above the uncut mixture's, the mean over models; of SmolLM2's, whose own loss is
    high, the divergence from it."""
    found = [
        row["divergence" if smollm2 else "above"] for row in rows
        if (row["way"], row["kept"]) == (way, kept) and (row["model"] == "smollm2") == smollm2
    ]  # fmt: skip
    return f"{sum(found) / len(found):.3f}" if found else ""


def cuts(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """A line for each way; without and with tuning. Columns without a number are left out."""
    groups = {"mixtures": False, "SmolLM2": True}
    columns = [(group, of, after) for group, of in groups.items() for after in EFFORTS]
    lines = []
    for way in ways():
        for kept in KEPT:
            losses = [lost(rows, f"{way}{after}", kept, smollm2=of) for _, of, after in columns]
            if not way.endswith((*EFFORTS,)[1:]) and any(losses):
                lines.append([way, f"{1 - kept:.0%}", *losses])
    filled = [n for n, cells in enumerate(zip(*lines, strict=True)) if any(cells)]
    names = ["chosen by", "goes", *(f"{group}{after}" for group, _, after in columns)]
    return [names[n] for n in filled], [[line[n] for n in filled] for line in lines]


def bits(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The mixtures by size: the experts that stay, and the values that store them; means."""
    found: dict[tuple[float, str], Rows] = {}
    for row in rows:
        if row["way"] == "bits" and row["model"] != "smollm2":
            found.setdefault((row["kept"], row["values"]), []).append(row)

    def mean(key: tuple[float, str], name: str) -> float:
        return sum(row[name] for row in found[key]) / len(found[key])

    return ["KiB", "experts that stay", "values", "nats lost"], [
        [f"{mean(key, 'bytes') / 2**10:.0f}", f"{key[0]:.0%}", key[1], f"{mean(key, 'above'):.3f}"]
        for key in sorted(found, key=lambda key: -mean(key, "bytes"))
    ]


def readme(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What the default loses on the mixtures, by what learns afterwards."""
    lines = [
        [f"{1 - kept:.0%}", *(lost(rows, f"reap{after}", kept, smollm2=False) for after in EFFORTS)]
        for kept in KEPT
    ]
    return ["experts that go", "only cut", "tuned (the default)", "healed"], lines


TABLES = {"readme": readme, "cuts": cuts, "bits": bits}


def main() -> None:
    """Fill the tables, as far as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path, help="the folder of the mixture")
    for name in ("calibration", "c4", "wiki"):
        parser.add_argument(f"--{name}", type=Path, help="a text of SmolLM2's")
    parser.add_argument("--judged", type=int, default=8, help="windows of each of its texts")
    parser.add_argument("--models", nargs="*", default=["mixture-0", "mixture-1", "mixture-2"])
    parser.add_argument("--ways", nargs="*", default=["*"], help="globs")
    parser.add_argument("--kept", nargs="*", type=float, default=[1.0, *KEPT])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    protocol = {
        "steps": STEPS, "calibration_windows_of_each_kind": CALIBRATION, "judged": JUDGED,
        "judged_windows_of_smollm2": args.judged, "random_draws": DRAWS, "loss": "nats per token",
    }  # fmt: skip
    benches = [letters(int(name.rpartition("-")[2]), args.work) for name in args.models]
    for bench in [*benches, *([smollm2(args)] if args.smollm2 else [])]:
        for named, made in cells(bench):
            wanted = any(fnmatch(named["way"], glob) for glob in args.ways)
            named = {"model": bench.name, **named}
            known = ({n: row.get(n) for n in named} for row in known_rows("experts", protocol))
            if wanted and named["kept"] in args.kept and named not in known:
                row = made()
                print(row, flush=True)
                add("experts", protocol, row)
    for table in TABLES.values():
        print(markdown(*table(known_rows("experts", protocol))))


if __name__ == "__main__":
    main()
