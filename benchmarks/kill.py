"""Kill -9 a run of SmolLM2-135M at ten random moments, resume it, compare the weights.

    python benchmarks/kill.py [--times 10] [--method sparsegpt]

Every run is a process of its own; the moment is drawn uniformly from the time an uninterrupted run
takes. The weights must be those of the uninterrupted run, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hardware import heading, keep


def command(output: Path, args: argparse.Namespace, *more: str) -> list[str]:
    """The command line of one run."""
    return [
        sys.executable, "-m", "secateur", "prune", args.model, "--output", str(output),
        "--method", args.method, "--sparsity", "0.5", "--calibration", args.calibration,
        "--windows", str(args.samples), "--sequence-length", "512", "--json", *more,
    ]  # fmt: skip


def digest(folder: Path) -> str:
    """Of all weight files."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        total.update(file.read_bytes())
        file.unlink()
    return total.hexdigest()


def main() -> None:
    """Kill and resume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(heading())
    rows, rng = [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        subprocess.run(command(folder / "whole", args), check=True, capture_output=True)
        whole_seconds = time.perf_counter() - started
        expected = digest(folder / "whole")
        for number in range(args.times):
            output = folder / f"run-{number}"
            moment = rng.uniform(0, whole_seconds)
            process = subprocess.Popen(
                command(output, args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            partial = output.with_name(output.name + ".partial")
            ledger = partial / "model" / "secateur" / "layers.jsonl"
            done = len(ledger.read_text().splitlines()) if ledger.exists() else None
            if not output.exists():
                subprocess.run(command(output, args, "--resume"), check=True, capture_output=True)
            rows.append(
                {
                    "killed_after_seconds": moment,
                    "layers_finished": done,
                    "identical": digest(output) == expected,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    protocol = dict(vars(args).items()) | {"whole_seconds": whole_seconds}
    print(f"written to {keep('kill', protocol, rows)}")
    sys.exit(0 if all(row["identical"] for row in rows) else 3)


if __name__ == "__main__":
    main()
