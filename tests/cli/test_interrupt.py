"""Ctrl-C: a real signal to a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WAITS = """
import sys, time
import secateur.workflows.{module} as workflow
from secateur.cli import main

def wait(*args, **options):
    sys.stdout.write("working\\n")
    sys.stdout.flush()
    time.sleep(600)

workflow.{function} = wait
sys.argv = ["secateur", *{words!r}]
main()
"""


@pytest.mark.parametrize(
    ("module", "function", "words", "remedy"),
    [
        (
            "prune.checkpoint",
            "run_recipe",
            ["prune", "a model", "--sparsity", "0.5", "--output", "{out}", "--restart"],
            "continue with: secateur prune 'a model' --sparsity 0.5 --output {out} --resume",
        ),
        (
            "judge.inspect",
            "inspect",
            ["inspect", "DIR"],
            "start again with: secateur inspect DIR",
        ),
    ],
)
def test_ctrl_c_names_the_command_that_continues(
    tmp_path: Path, module: str, function: str, words: list[str], remedy: str
) -> None:
    out = str(tmp_path / "out")
    words = [word.format(out=out) for word in words]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(module=module, function=function, words=words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SECATEUR_HOME": str(tmp_path / "home")},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "error: interrupted" in err
    assert remedy.format(out=out) in err
    assert "Traceback" not in err
