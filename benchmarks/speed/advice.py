"""What `secateur advise` predicts for this machine, beside what `secateur bench` measures.

    python -m benchmarks.speed.advice [--work DIR] [--rounds 3] [--models 1.1b smollm2]

Two shapes with random weights (`int4_models.py` writes them, into the same `--work`): TinyLlama's
1.1 B and SmolLM2-135M's. Each is stored in four ways. In every round each way is first predicted as `advise` does
it, with random matrices in this process; right after it the real packed folder decodes in a process
of its own: a prompt of 64 tokens and 32 new ones. So other work on the machine affects both alike.
Numbers are medians over rounds, and the error of the speed is the median of the errors of rounds.
Memory is the growth of the process when the model is loaded and has generated two tokens.
What is finished is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep, markdown
from benchmarks.speed.int4_models import NEW_TOKENS, PROMPT_TOKENS, SHAPES, STORED, make
from benchmarks.stored import known_rows
from transformers import AutoConfig

from secateur.advisor.advice import weight_bytes
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS, CompressionWay
from secateur.evaluation.speed import Process
from secateur.models.counting import counted
from secateur.models.shape import memory_with
from secateur.models.skeleton import build_skeleton
from secateur.runtime.formats import WeightFormat
from secateur.runtime.random_models import FormatTimer

MEASURES = ("src/secateur/advisor/advice.py", "src/secateur/runtime/random_models.py")
MINUTES = 9

ZEROS_OF = {"bitmask": ("50%", 0.5), "dense": ("dense", 0.0)}
NAMES = [name for name in STORED if name.startswith(("50 %", "dense"))]


def measured(model: str, name: str, work: Path, rounds: int) -> dict[str, Any]:
    """Predictions and measurements of one shape that is stored in one way."""
    folders = dict(zip(STORED, make(SHAPES[model], work), strict=False))
    backend, folder = folders[name]
    how = STORED[name]
    zeros, sparsity = ZEROS_OF[how["format"]]
    option = CompressionWay(STRUCTURES["whole"], ZEROS[zeros], VALUES[how["values"]])
    shape = counted(model, build_skeleton(folder, alone=True))
    timer = FormatTimer(AutoConfig.from_pretrained(folder), WeightFormat(how["values"], sparsity))
    process = Process(backend, folder)
    try:
        process.load([300 + i for i in range(PROMPT_TOKENS)], NEW_TOKENS, "cpu")
        if "failure" in process.ready:
            raise RuntimeError(f"{model}, {name}: {process.ready['failure']}")
        pairs = [(timer.turn(), process.ask("round")) for _ in range(rounds)]
    finally:
        process.end()
    predicted = [1e3 * (forecast.outside + forecast.layers) for forecast, _ in pairs]
    found = [1e3 * round["each_token"] for _, round in pairs]
    weights = weight_bytes(shape, option)
    memory = memory_with(weights, shape, "cpu", 1, PROMPT_TOKENS + NEW_TOKENS)
    return {
        "model": model,
        "stored": name,
        "predicted_ms": statistics.median(predicted),
        "measured_ms": statistics.median(found),
        "time_error": statistics.median(a / b - 1 for a, b in zip(predicted, found, strict=True)),
        "predicted_ms_each": predicted,
        "measured_ms_each": found,
        "predicted_bytes": memory.total,
        "measured_bytes": process.ready["resident_bytes"],
    }


def forecasts(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The errors of forecasts of each shape, over the ways to store it."""
    names, lines = {"smollm2": "135M", "1.1b": "1.1 B"}, []
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] in names):
        own = [row for row in rows if row["model"] == model]
        memory = [row["predicted_bytes"] / row["measured_bytes"] - 1 for row in own]
        times = sorted(row["time_error"] for row in own)
        lines.append([
            names[model], ", ".join(row["stored"] for row in own), f"{times[0]:+.0%} to {times[-1]:+.0%}",
            f"{min(memory):+.0%} to {max(memory):+.0%}",
        ])  # fmt: skip
    return ["shape", "stored", "error of ms/token", "error of memory"], lines


TABLES = {"forecasts": forecasts}


def main() -> None:
    """Make the models, predict, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the models, kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--name", default="advice", help="of the file with the rows")
    args = parser.parse_args()
    print(heading())
    protocol = {"protocol": __doc__, "rounds": args.rounds}
    rows = known_rows(args.name, protocol, heading())
    with tempfile.TemporaryDirectory() as scratch:
        for model, name in product(args.models, NAMES):
            if any((row["model"], row["stored"]) == (model, name) for row in rows):
                continue
            rows.append(measured(model, name, (args.work or Path(scratch)) / model, args.rounds))
            keep(args.name, protocol, rows)
    print(markdown(*forecasts(rows)))


if __name__ == "__main__":
    main()
