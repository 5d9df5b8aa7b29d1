"""Runs verbs that wait in the middle, so that a test can start a second run meanwhile.

Reads lines from stdin: the name of a case, a tab, the output. Prints `held` at the first step of
the work, waits for one line more, goes on, and prints `done`, or the error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cases import CASES


class Waiting:
    """A progress that waits at its first step."""

    def __init__(self) -> None:
        self.waited = False

    def start(self, label: str, steps: int) -> None:
        pass

    def step(self, count: int = 1, note: str = "") -> None:
        if not self.waited:
            self.waited = True
            print("held", flush=True)
            sys.stdin.readline()

    def finish(self) -> None:
        pass


def main() -> None:
    """Serve until stdin ends."""
    sources = Path(sys.argv[1])
    while line := sys.stdin.readline():
        name, output = line.rstrip("\n").split("\t")
        try:
            CASES[name].call(sources, Path(output), Waiting())
            print("done", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    main()
