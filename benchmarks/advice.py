"""What `secateur advise` predicts for this machine, beside what `secateur bench` measures.

    python benchmarks/advice.py [--work DIR] [--rounds 7] [--models 1.1b 360m smollm2]

Three shapes with random weights (`int4_models.py` writes them): TinyLlama's 1.1 B, SmolLM2's 360M
and 135M. Each is stored in four ways. In every round each way is first predicted as `advise` does
it, with random matrices in this process; right after it the real packed folder decodes in a process
of its own: a prompt of 64 tokens and 32 new ones. So other work on the machine affects both alike.
Numbers are medians over rounds, and the error of the speed is the median of the errors of rounds.
Memory is the growth of the process when the model is loaded and has generated two tokens.
A finished model is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hardware import heading, keep, markdown
from int4_models import NEW_TOKENS, PROMPT_TOKENS, SHAPES, STORED, make
from secateur.advisor.memory import memory_of
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS, CompressionWay
from secateur.evaluation.speed import Process
from secateur.evaluation.token_times import Way, WayTimer
from secateur.models.skeleton import build_skeleton
from secateur.workflows.advise import counted
from stored import known_rows

ZEROS_OF = {"bitmask": ("50%", 0.5), "dense": ("dense", 0.0)}


def rows_of(model: str, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Predictions and measurements of one shape."""
    contenders = [pair for pair in make(SHAPES[model], work) if pair[0] == "packed"]
    folder = contenders[0][1]
    shape = counted(model, build_skeleton(folder, alone=True))
    config = AutoConfig.from_pretrained(folder)
    prompt = [300 + i for i in range(PROMPT_TOKENS)]
    rows = []
    for (name, how), (contender, place) in zip(STORED.items(), contenders, strict=True):
        zeros, sparsity = ZEROS_OF[how["format"]]
        way = Way(how["values"], sparsity)
        option = CompressionWay(STRUCTURES["whole"], ZEROS[zeros], VALUES[how["values"]])
        timer = WayTimer(config, way)
        process = Process(contender, place)
        try:
            process.load(prompt, NEW_TOKENS)
            pairs = [(timer.turn(), process.ask("round")) for _ in range(rounds)]
        finally:
            process.end()
        told = [1e3 * (forecast.ends + forecast.layers) for forecast, _ in pairs]
        found = [1e3 * measured["each_token"] for _, measured in pairs]
        memory = memory_of(shape, option, "cpu", 1, PROMPT_TOKENS + NEW_TOKENS)
        rows.append(
            {
                "model": model,
                "stored": name,
                "predicted_ms": statistics.median(told),
                "measured_ms": statistics.median(found),
                "time_error": statistics.median(
                    a / b - 1 for a, b in zip(told, found, strict=True)
                ),
                "predicted_ms_each": told,
                "measured_ms_each": found,
                "predicted_bytes": memory.total,
                "measured_bytes": process.ready["resident_bytes"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    lines = []
    for row in rows:
        time = row["time_error"]
        memory = row["predicted_bytes"] / row["measured_bytes"] - 1
        lines.append(
            [
                row["model"], row["stored"],
                f"{row['predicted_ms']:.2f}", f"{row['measured_ms']:.2f}", f"{time:+.0%}",
                f"{row['predicted_bytes'] / 2**20:.0f}", f"{row['measured_bytes'] / 2**20:.0f}",
                f"{memory:+.1%}",
            ]
        )  # fmt: skip
    columns = ["model", "stored", "ms/token predicted", "measured", "", "MiB predicted", "measured"]
    return markdown([*columns, ""], lines)


def main() -> None:
    """Make the models, predict, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the models, kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    args = parser.parse_args()
    print(heading())
    protocol = {"protocol": __doc__, "rounds": args.rounds}
    rows = known_rows("advice", protocol, heading())
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            if all(row["model"] != model for row in rows):
                rows += rows_of(model, (args.work or Path(scratch)) / model, args.rounds)
                keep("advice", protocol, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
