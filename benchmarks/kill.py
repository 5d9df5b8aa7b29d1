"""Kill -9 every verb at random moments, run it again, compare all that it writes.

    python -m benchmarks.kill [--times 1] [--seed 0] [--cases prune fit]

The cases are those of `tests/runs/cases.py`: every verb that writes a folder, and every way through
it, on tiny models. Each is killed `--times` times; a run that ends before its kill does not count.
Each run is a process of its own. The moment is drawn uniformly from the time that an uninterrupted run
takes between its first line of work and its end. Then the same verb runs again, with `resume` where
it has one. The folder must be that of the uninterrupted run: weights and configuration byte for
byte, and the same names of notes.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.hardware import heading, keep, markdown

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "runs"), str(TESTS / "support")]

from cases import CASES, make_sources  # noqa: E402
from contents import contents  # noqa: E402

MEASURES = ("src/secateur/runs",)
MINUTES = 20

CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from cases import CASES
from secateur.progress import Silent
case, sources, output = CASES[sys.argv[2]], Path(sys.argv[3]), Path(sys.argv[4])
more = case.retry(False) if sys.argv[5] == "again" else {}
print("begun", flush=True)
case.call(sources, output, Silent(), **more)
"""


def started(name: str, sources: Path, output: Path, how: str) -> subprocess.Popen[str]:
    """A process that has just begun the work of a verb."""
    words = [json.dumps(sys.path[:2]), name, str(sources), str(output), how]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a process that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)


def whole_runs(names: list[str], sources: Path, place: Path) -> dict[str, tuple[float, dict]]:
    """Seconds and contents of an uninterrupted run of every case."""
    found = {}
    for name in names:
        output = place / "whole" / name.replace(" ", "-") / CASES[name].output
        output.parent.mkdir(parents=True)
        begun = time.perf_counter()
        finished(started(name, sources, output, "first"))
        found[name] = (time.perf_counter() - begun, contents(output))
        print(f"{name}: {found[name][0]:.1f} s", flush=True)
    return found


def killed(name: str, seconds: float, sources: Path, place: Path) -> tuple[bool, dict[str, str]]:
    """Kill a run after some seconds, and finish it; whether it was killed, and what it wrote."""
    output = place / CASES[name].output
    place.mkdir(parents=True)
    process = started(name, sources, output, "first")
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{name} failed by itself")
    if not output.exists():  # it is there if the kill came after the last step
        finished(started(name, sources, output, "again"))
    return process.returncode != 0, contents(output)


def main() -> None:
    """Kill and run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(heading())
    rows, rng = [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_sources(place / "sources")
        whole = whole_runs(args.cases, place / "sources", place)
        left = args.cases * args.times
        while left:
            name = left[0]
            seconds, expected = whole[name]
            moment = rng.uniform(0, seconds)
            cut, found = killed(name, moment, place / "sources", place / f"run-{len(rows)}")
            rows.append(
                {
                    "case": name,
                    "share_of_run": moment / seconds,
                    "killed": cut,
                    "identical": found == expected,
                }
            )
            left = left[cut:]
            print(json.dumps(rows[-1]), flush=True)
    print(f"written to {keep('kill', vars(args), rows)}")
    print(markdown(*counts(rows)))
    sys.exit(0 if all(row["identical"] for row in rows) else 3)


def counts(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """How many runs of a verb were killed, and how many of them ended as the uninterrupted one."""
    killed = [row for row in rows if row["killed"]]
    ends = {}
    for row in killed:
        ends.setdefault(row["case"].split()[0], []).append(row["identical"])
    lines = [[verb, str(len(own)), str(sum(own))] for verb, own in ends.items()]
    total = ["all", str(len(killed)), str(sum(row["identical"] for row in killed))]
    return ["verb", "killed at a random moment", "then identical"], [*lines, total]


TABLES = {"verbs": counts}


if __name__ == "__main__":
    main()
