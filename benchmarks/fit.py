"""`secateur fit` on SmolLM2-135M at several sizes, against single techniques at the same sizes.

    python benchmarks/fit.py --calibration c4.jsonl --text wiki.txt --work DIR [--sizes 60 75]

The levels are made once, with 43 windows of 512 tokens of the calibration text; 10 windows choose,
10 judge (`c4`), and the first 16 windows of the text judge too (`wiki`). Size 0 has every level
alone, and types of llama.cpp's quantizer, which are larger where rows are no multiple of 256
weights, as here. For each other size the candidates are the finalists of `secateur fit`: what the
survey chooses, what the search finds, the best mix of levels that are only rounded, each made as a
real model; and the best single level. `winner` is the one with the least divergence on the windows
that choose. Loss in nats above the dense model's; divergences on the windows that choose: predicted
by the survey, of the levels put together (`mixed`), and of the model that was made. The source is a
4-bit file (Q4_1), so its dense weights have only 16 values in a group of 32. Every finished row is
kept at once. Times are not compared.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hardware import add, heading, markdown
from secateur import export
from secateur.calibration.run_windows import WindowReader
from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.perplexity import dense_losses
from secateur.models.checkpoint import CheckpointReader
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.recipes.compress import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.shared import CalibrationWindows
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fit import best_of, build_candidates, survey_levels
from secateur.steps.fitting.context import FitContext, TimeBudget
from secateur.steps.fitting.costs import costs_of
from stored import known_rows

MIB = 2**20
K_TYPES = ("q8_0", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
"""By llama.cpp's own quantizer, without an importance matrix."""


def recipe_of(args: argparse.Namespace) -> FitRecipe:
    """The recipe that makes the levels."""
    return build_recipe(
        FitRecipe,
        {
            "model": "smollm2-135m", "max_size": "1GiB", "generations": args.generations,
            "structure": args.structure,
            "calibration": {"source": str(args.calibration), "windows": 64, "sequence_length": 512},
        },
    )  # fmt: skip


def rows(args: argparse.Namespace) -> None:
    """Make the levels, then a row for each size."""
    recipe, source = recipe_of(args), resolve("smollm2-135m")
    model = PackableCheckpoint.open(source.folder)
    costs = costs_of(recipe, model, Silent())
    (rest,) = costs.rest
    budget = TimeBudget(None, args.work / "pace.json", 0.0)
    args.work.mkdir(parents=True, exist_ok=True)
    context = FitContext.prepare(recipe, source, model, costs, budget, args.work, Silent())
    measured, _ = survey_levels(context)
    measured = replace(measured, frontier=())
    options = CalibrationWindows(windows=16, sequence_length=512)
    reader = WindowReader.of_folder(
        source.folder, context.target.model.config, trust_remote_code=False
    )
    wiki, _ = reader.read(str(args.text), options)
    texts = {"c4": context.judging.windows, "wiki": wiki}
    dense = {name: loss_of(source.folder, windows) for name, windows in texts.items()}

    def kept(size: float, label: str, folder: Path, cost: float, **values: float) -> None:
        if known(size, label):
            return
        loss = {name: loss_of(folder, text) - dense[name] for name, text in texts.items()}
        row = {"size": size, "contender": label, "mib": (rest + cost) / MIB, **values, **loss}
        add("fit", {"judged": "see benchmarks/fit.py"}, row)
        print(row, flush=True)

    for point, level in zip(measured.singles, measured.search.levels, strict=True):
        folder = level.reader.folder
        kept(0, point.name, folder, point.cost[0], divergence=point.divergence)
    for kind in args.llama_cpp:
        if not known(0, f"llama.cpp {kind}"):
            folder, size = by_llama_cpp(source.folder, kind, args.work)
            kept(0, f"llama.cpp {kind}", folder, size - rest)
            shutil.rmtree(folder)
    for size in args.sizes:
        if known(size, "winner"):
            continue
        began = time.perf_counter()
        within = costs.narrowed(size * MIB - rest)
        candidates, cuts = build_candidates(measured, within)
        best = best_of(candidates)
        for one in [*candidates, replace(best, row=replace(best.row, name="winner"))]:
            values = {n: getattr(one.row, n) for n in ("predicted", "mixed", "divergence")}
            kept(size, one.row.name, one.folder, one.row.file_bytes - rest, **values)
        print(cuts)
        print(f"{size} MiB: {time.perf_counter() - began:.0f} s", flush=True)


def loss_of(folder: Path, windows: Tensor) -> float:
    """The mean loss of the next token, in nats."""
    target = CheckpointTarget(CheckpointReader(folder), None, torch.device("cpu"))
    losses = dense_losses(target, windows, 0, Silent())
    return sum(losses) / len(losses)


def by_llama_cpp(source: Path, kind: str, work: Path) -> tuple[Path, int]:
    """A model that llama.cpp's quantizer has rounded, as a folder of float32 weights; its bytes."""
    made, folder = work / "gguf", work / f"llama.cpp-{kind}"
    export(source, to="gguf", type=kind, output=made, overwrite=True)
    (file,) = made.glob("*.gguf")
    shutil.copytree(resolve(str(file), dtype="float32").folder, folder, dirs_exist_ok=True)
    size = file.stat().st_size
    shutil.rmtree(made)
    return folder, size


def known(size: float, label: str) -> bool:
    """Whether a row is there."""
    return any((r["size"], r["contender"]) == (size, label) for r in known_rows("fit"))


def table() -> str:
    """As it stands in the documentation."""
    lines = [
        [f"{r['size'] or '':}", r["contender"], f"{r['mib']:.1f}", f"{r['wiki']:.3f}",
         f"{r['c4']:.3f}"]
        for r in sorted(known_rows("fit"), key=lambda r: (r["size"], r["mib"]))
    ]  # fmt: skip
    return markdown(["at most, MiB", "", "MiB", "loss, WikiText-2", "loss, C4"], lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[60, 75, 90, 120, 150])
    parser.add_argument("--llama-cpp", nargs="*", default=list(K_TYPES), help="types to add")
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--structure", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    print(heading())
    with torch.no_grad():
        rows(args)
    print(table())


if __name__ == "__main__":
    main()
