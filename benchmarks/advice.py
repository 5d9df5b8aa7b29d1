"""What `secateur advise` predicts for this machine, beside what `secateur bench` measures.

    python benchmarks/advice.py [--work DIR] [--rounds 5]

Three shapes with random weights (`int4_models.py` writes them): TinyLlama's 1.1 B, SmolLM2's 360M
and 135M. Each is stored in four ways. First the models are timed as `advise` does it, without their
weights; then the real packed folders decode in turns, a prompt of 64 tokens and 32 new ones,
medians over rounds. Memory is the growth of the process when the model is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hardware import heading, keep, markdown
from int4_models import NEW_TOKENS, PROMPT_TOKENS, SHAPES, STORED, make
from secateur.advisor.memory import memory_of
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS, CompressionWay
from secateur.evaluation.speed import take_turns
from secateur.evaluation.token_times import Way, time_tokens
from secateur.models.skeleton import build_skeleton
from secateur.progress import Silent
from secateur.workflows.advise import counted

ZEROS_OF = {"bitmask": ("50%", 0.5), "dense": ("dense", 0.0)}


def rows_of(model: str, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Predictions and measurements of one shape."""
    contenders = [pair for pair in make(SHAPES[model], work) if pair[0] == "packed"]
    folder = contenders[0][1]
    shape = counted(model, build_skeleton(folder, alone=True))
    config = AutoConfig.from_pretrained(folder)
    ways, stored = {}, {}
    for name, how in STORED.items():
        zeros, sparsity = ZEROS_OF[how["format"]]
        stored[name] = CompressionWay(STRUCTURES["whole"], ZEROS[zeros], VALUES[how["values"]])
        ways[name] = Way(how["values"], sparsity)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "times.json"
        timed = time_tokens(config, list(ways.values()), Silent(), file=file)
    prompt = [300 + i for i in range(PROMPT_TOKENS)]
    found = take_turns(contenders, prompt=prompt, new_tokens=NEW_TOKENS, rounds=rounds)
    rows = []
    for name, speed in zip(STORED, found, strict=True):
        told = timed[ways[name]]
        context = PROMPT_TOKENS + NEW_TOKENS
        rows.append(
            {
                "model": model,
                "stored": name,
                "predicted_ms": 1e3 * (told.ends + told.layers),
                "measured_ms": 1e3 / speed.tokens_per_second,
                "predicted_bytes": memory_of(shape, stored[name], "cpu", 1, context).total,
                "measured_bytes": speed.resident_bytes,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    lines = []
    for row in rows:
        time = row["predicted_ms"] / row["measured_ms"] - 1
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    args = parser.parse_args()
    print(heading())
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            rows += rows_of(model, (args.work or Path(scratch)) / model, args.rounds)
    keep("advice", {"protocol": __doc__, "rounds": args.rounds}, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
