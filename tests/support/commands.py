"""A command of `secateur`, in this process or in others, and what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from secateur.cli import main


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def launched(processes: int, *words: object) -> Outcome:
    """Run Python with these words in so many processes of torchrun, each with one thread."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *map(str, words)],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def runner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """A function that runs a command of these words."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run
