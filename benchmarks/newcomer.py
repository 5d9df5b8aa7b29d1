"""Walk a newcomer's path with a clock: clone, `make setup`, `make demo`, then docs/start.md.

    python benchmarks/newcomer.py FOLDER [--repository DIR] [--python python3]

FOLDER must not exist; it holds the clone, the commands' files and `walk.log` with all that was
printed. The commands of docs/start.md are those of its `bash` blocks, typed one after the other
into one shell. The environment that they make is beside that of `make`. Packages come from the
index of pip or from its cache; the sample model too, unless it is there.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hardware import keep

REPOSITORY = Path(__file__).parents[1]
QUESTION = "What is the capital of France?\n"
MARK = "@newcomer"


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
        said += [f"echo {MARK} {number}", f"{fed}{line}", f"echo {MARK} {number} $?"]
    return "\n".join(said) + "\n"


def walk(lines: list[str], folder: Path, log: Path) -> list[dict[str, Any]]:
    """Type the lines in a folder; the seconds of each.

    Raises:
        SystemExit: a command failed.
    """
    shell = subprocess.Popen(
        ["bash", "-c", script(lines)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None
    rows: list[dict[str, Any]] = []
    began = 0.0
    with log.open("a", encoding="utf-8") as told:
        for line in shell.stdout:
            words = line.split()
            if words[:1] != [MARK]:
                told.write(line)
                continue
            command = lines[int(words[1])]
            if len(words) == 2:
                began = time.monotonic()
                told.write(f"\n$ {command}\n")
                continue
            seconds = time.monotonic() - began
            told.write(f"[{seconds:.1f} s]\n")
            told.flush()
            print(f"{seconds:8.1f} s  {command}", flush=True)
            if words[2] != "0":
                sys.exit(f"{command} failed with {words[2]}: see {log}")
            rows.append({"command": command, "seconds": round(seconds, 1)})
    return rows


def main() -> None:
    """Walk, and write the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--python", default="python3")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True)
    log = folder / "walk.log"
    here = shlex.quote(str(chosen.repository.resolve()))
    rows = [
        {"part": "make", **row}
        for row in walk(
            [
                f"git clone --quiet {here} made",
                "cd made",
                f"make setup PYTHON={shlex.quote(chosen.python)}",
                "make demo",
            ],
            folder,
            log,
        )
    ]
    lines = [
        line.replace("REPOSITORY", here).replace("python3 ", f"{chosen.python} ")
        for line in commands(folder / "made" / "docs" / "start.md")
    ]
    rows += [{"part": "start", **row} for row in walk(lines, folder, log)]
    for row in rows:
        row["command"] = row["command"].replace(here, "REPOSITORY")
    keep("newcomer", {"packages": "from pip's cache and index", "chat": QUESTION.strip()}, rows)


if __name__ == "__main__":
    main()
