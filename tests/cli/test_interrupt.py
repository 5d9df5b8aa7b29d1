"""Ctrl-C: a real signal to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

WAITS = """
import signal, sys, time
from secateur.steps.prune import Prune
from secateur.cli import main

def wait(*args, **options):
    print("working", flush=True)
    time.sleep(60)

Prune.check = wait
sys.argv = ["secateur", *sys.argv[1:]]
# a shell starts background jobs with Ctrl-C ignored, and a test suite may be one
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def test_ctrl_c_names_the_command_that_continues(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["prune", "a model", "--sparsity", "0.5", "--output", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, *words, "--restart"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.startswith("error: interrupted\n")
    assert f"--output {out} --resume" in err
    assert "Traceback" not in err


TWICE = """
import atexit, os, signal, sys
import secateur.cli.errors as errors
from secateur.steps.prune import Prune
from secateur.cli import main

def press(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)

Prune.check = press
explain = errors.to_error
errors.to_error = lambda error: (press(), explain(error))[1]
sys.argv = ["secateur", *sys.argv[1:]]
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(press)
main()
"""


def test_a_second_ctrl_c_changes_nothing(tmp_path: Path) -> None:
    words = ["prune", "a model", "--sparsity", "0.5", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted\n")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
