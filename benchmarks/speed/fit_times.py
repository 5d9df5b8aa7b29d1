"""The time of a token as `secateur fit` predicts it, against `secateur bench` of packed models.

    python -m benchmarks.speed.fit_times --work DIR [--mixes 10] [--rounds 7]

SmolLM2-135M. The candidates are all linears dense int8, dense int4, int8 with 50 % zeros and int4
with 50 % zeros, and random mixes: each takes two to all of the ways of `--target cpu`, and every
linear draws one of them. Zeros are the smallest weights of each row; numbers do not change speed.
Each candidate is packed and timed beside dense int8 by the processes of `secateur bench`. Rows hold
the predicted time, the lowest and the median time of the rounds, and the same for the speed-up over
dense int8. The machine is shared, so the median of a run is far above its lowest time; the table of
matrices holds lowest times, and the speed-up compares medians of one run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur.evaluation.random_models import WeightFormat
from secateur.evaluation.speed import Speed, take_turns
from secateur.evaluation.token_times import BASE, MatrixTimes, time_matrices
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.runtime.storage_plan import PackableCheckpoint

MEASURES = ("src/secateur/steps/fitting", "src/secateur/runtime/kernels")

FORMATS = (
    *(
        WeightFormat(values, sparsity)
        for values in ("bf16", "int8", "int4")
        for sparsity in (0.0, 0.5)
    ),
    WeightFormat("bf16", 0.7),
    WeightFormat("int4", 0.7),
)
UNIFORM = {
    "int8": BASE,
    "int4": WeightFormat("int4", 0.0),
    "50 % zeros, int8": WeightFormat("int8", 0.5),
    "50 % zeros, int4": WeightFormat("int4", 0.5),
}
NAMES = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}
PROMPT, NEW = 32, 8

Mix = Mapping[str, WeightFormat]
"""The way of every linear, by its stored name."""


def mixes(names: list[str], count: int) -> dict[str, Mix]:
    """The candidates, by name."""
    found: dict[str, Mix] = {name: dict.fromkeys(names, stored) for name, stored in UNIFORM.items()}
    for number in range(count):
        random = Random(number)
        few = random.sample(FORMATS, random.randint(2, len(FORMATS)))
        found[f"mix {number}"] = {name: random.choice(few) for name in names}
    return found


def pruned(weight: Tensor, sparsity: float) -> Tensor:
    """Zeros at the smallest weights of each row."""
    if not sparsity:
        return weight
    count = round(sparsity * weight.shape[1])
    smallest = weight.abs().float().argsort(1)[:, :count]
    return weight.scatter(1, smallest, 0.0)


def packed(name: str, mix: Mix, linears: Mapping[str, str], source: Path, work: Path) -> Path:
    """Pack a candidate, unless that was done."""
    dense, output = work / "dense", work / name.replace(" ", "-").replace("%", "percent")
    if output.exists():
        return output
    shutil.rmtree(dense, ignore_errors=True)
    shutil.copytree(source, dense)
    for file in dense.glob("*.safetensors"):
        tensors = load_file(file)
        zeros = {n: pruned(w, mix[n].sparsity) for n, w in tensors.items() if n in mix}
        save_file({**tensors, **zeros}, file, metadata={"format": "pt"})
    secateur.compress(
        dense, output=output, values="bfloat16", embeddings="int8",
        overrides={
            linears[n]: NAMES[stored.values]
            for n, stored in mix.items() if stored.values != "bf16"
        },
    )  # fmt: skip
    return output


def timed(folder: Path, rounds: int) -> tuple[Speed, Speed]:
    """The candidate and dense int8, in turns, as `secateur bench` times them."""
    prompt = torch.randint(0, 1000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, dense = take_turns(
        [("packed", folder), ("dense int8", folder)], prompt=prompt, new_tokens=NEW, rounds=rounds
    )
    return ours, dense


def row_of(name: str, mix: Mix, shapes: Mapping[str, Any], times: MatrixTimes,
           folder: Path, rounds: int) -> dict[str, Any]:  # fmt: skip
    """Predict and measure one candidate."""
    predicted = times.rest + sum(times.seconds(shapes[n], stored) for n, stored in mix.items())
    ours, dense = timed(folder, rounds)
    return {
        "candidate": name,
        "predicted_ms": 1e3 * predicted,
        "lowest_ms": 1e3 * min(ours.each_token),
        "median_ms": 1e3 * statistics.median(ours.each_token),
        "int8_lowest_ms": 1e3 * min(dense.each_token),
        "int8_median_ms": 1e3 * statistics.median(dense.each_token),
        "predicted_speedup": times.base / predicted,
        "speedup": statistics.median(dense.each_token) / statistics.median(ours.each_token),
        "resident_bytes": ours.resident_bytes,
        "rounds": len(ours.each_token),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    lines = []
    for row in rows:
        off = row["predicted_ms"] / row["lowest_ms"] - 1
        off_speed = row["predicted_speedup"] / row["speedup"] - 1
        lines.append(
            [
                row["candidate"], f"{row['predicted_ms']:.2f}", f"{row['lowest_ms']:.2f}",
                f"{off:+.0%}", f"{row['median_ms']:.2f}", f"{row['predicted_speedup']:.2f}",
                f"{row['speedup']:.2f}", f"{off_speed:+.0%}",
            ]
        )  # fmt: skip
    columns = ["linears", "ms/token, predicted", "lowest", "", "median", "speed-up, predicted"]
    return markdown([*columns, "measured", ""], lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mixes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pack", action="store_true", help="only pack the candidates")
    args = parser.parse_args()
    print(heading())
    source = resolve("smollm2-135m").folder
    model = PackableCheckpoint.open(source)
    linears = {stored: name for name, stored in model.linears.items()}
    shapes = {name: tuple(model.reader.entries[name].shape) for name in linears}
    candidates = mixes(list(linears), args.mixes)
    folders = {n: packed(n, mix, linears, source, args.work) for n, mix in candidates.items()}
    if args.pack:
        return
    times = time_matrices(build_skeleton(source).config, list(shapes.values()), FORMATS, Silent())
    print(f"rest {1e3 * times.rest:.2f} ms, int8 {1e3 * times.base:.2f} ms, {times.measured}")
    for (shape, stored), share in times.shares.items():
        print(f"{shape} {stored}: {1e6 * share * times.layers[stored]:.1f} us")
    done = {row["candidate"] for row in known_rows("fit-times")}
    for name, mix in candidates.items():
        if name not in done:
            row = row_of(name, mix, shapes, times, folders[name], args.rounds)
            add("fit-times", {"protocol": __doc__}, row)
            print(row, flush=True)
    print(table(known_rows("fit-times")))


if __name__ == "__main__":
    main()
