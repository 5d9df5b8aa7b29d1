"""Ctrl-C: a real signal to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

WAITS = """
import signal, sys, time
import secateur.steps.prune as workflow
from secateur.cli import main

def wait(*args, **options):
    print("working", flush=True)
    time.sleep(60)

workflow.prune_recipe = wait
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
    assert f"continue with: secateur prune 'a model' --sparsity 0.5 --output {out} --resume" in err
    assert "Traceback" not in err
