"""Walk a newcomer's path with a clock: clone, then docs/start.md.

    python -m benchmarks.newcomer FOLDER [--repository DIR] [--python python3]

FOLDER must not exist; it holds the clone, the commands' files and `walk.log` with all that was
printed. The commands of docs/start.md are those of its `bash` blocks, typed one after the other
into one shell. Packages come from the index of pip or from its cache; the sample model too, unless
it is there.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep

MEASURES = ("src/secateur/steps/prune.py", "src/secateur/steps/compress.py")
MINUTES = 8

REPOSITORY = Path(__file__).parents[1]
QUESTION = "What is the capital of France?\n"
MARK = "@newcomer"
CPU = re.compile(r"\d+m[\d.]+s \d+m[\d.]+s")
"""A line of the shell's `times`."""


def commands(page: Path) -> list[str]:
    """The commands of a page's `bash` blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def script(lines: list[str]) -> str:
    """Lines for a shell that says when each began, and how it ended.

    A chat gets one question; nothing else reads what is typed.
    """
    said = ["exec 2>&1"]
    for number, line in enumerate(lines):
        fed = f"printf {shlex.quote(QUESTION)} | " if line.startswith("secateur chat") else ""
        said += [f"echo {MARK} {number}", f"{fed}{line}", f"echo {MARK} {number} $?", "times"]
    return "\n".join(said) + "\n"


def walk(lines: list[str], folder: Path, log: Path) -> list[dict[str, Any]]:
    """Type the lines in a folder; the seconds of each, and those of all processors.

    Raises:
        SystemExit: a command failed.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shell = subprocess.Popen(
        ["bash", "-c", script(lines)],
        cwd=folder,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None
    rows: list[dict[str, Any]] = []
    began, cpu = 0.0, list[float]()
    with log.open("a", encoding="utf-8") as file:
        for line in shell.stdout:
            words = line.split()
            if CPU.fullmatch(line.strip()):
                cpu.append(sum(map(in_seconds, words)))
                continue
            if words[:1] != [MARK]:
                file.write(line)
                continue
            command = lines[int(words[1])]
            if len(words) == 2:
                began = time.monotonic()
                file.write(f"\n$ {command}\n")
                continue
            seconds = time.monotonic() - began
            file.write(f"[{seconds:.1f} s]\n")
            file.flush()
            print(f"{seconds:8.1f} s  {command}", flush=True)
            if words[2] != "0":
                sys.exit(f"{command} failed with {words[2]}: see {log}")
            rows.append({"command": command, "seconds": round(seconds, 1)})
    used = [0.0, *cpu[1::2]]  # of the shell and of its children, in turn; all commands together
    for row, (before, after) in zip(rows, pairwise(used), strict=True):
        row["processor_seconds"] = round(after - before, 1)
    return rows


def in_seconds(text: str) -> float:
    """The seconds of a time such as 1m2.345s."""
    minutes, _, seconds = text.removesuffix("s").partition("m")
    return 60 * float(minutes) + float(seconds)


def start(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The steps of docs/start.md that take more than a moment."""

    def words(command: str) -> str:
        return "`" + " ".join(command.split()[:2] + ["."] * (command == "pip install .")) + "`"

    def clock(seconds: float) -> str:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"

    shown = [row for row in rows if row["seconds"] >= 1]
    shown = [row for row in shown if row["command"].startswith(("pip", "secateur"))]
    lines = [
        [words(r["command"]), clock(r["seconds"]), clock(r["processor_seconds"])] for r in shown
    ]
    return ["step", "time", "CPU time, both cores"], lines


TABLES = {"start": start}


def main() -> None:
    """Walk, and write the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--python", default="python3")
    chosen = parser.parse_args()
    folder, python = chosen.folder.resolve(), shlex.quote(chosen.python)
    folder.mkdir(parents=True)
    repository = chosen.repository.resolve()
    here = shlex.quote(str(repository))
    page = commands(repository / "docs" / "start.md")
    typed = [f"git clone --quiet {here} secateur", "cd secateur"]
    typed += [line.replace("python3 ", f"{python} ") for line in page]
    rows = walk(typed, folder, folder / "walk.log")
    conditions = {"measured": heading(), "running": round(os.getloadavg()[2], 1)}
    rows = [{**conditions, **row} for row in rows]
    for row in rows:
        row["command"] = row["command"].replace(here, "REPOSITORY")
    protocol = {
        "packages": "from pip's cache and index",
        "chat": QUESTION.strip(),
        "running": "processes that wanted a processor in its last 15 minutes, on average",
    }
    keep("newcomer", protocol, rows)


if __name__ == "__main__":
    main()
