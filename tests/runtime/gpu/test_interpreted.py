"""Runs the GPU's kernels in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and torch may have imported it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

import secateur
from secateur.errors import KernelError

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_computes_right_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install '.[gpu]'")
    root = HERE.parents[2]
    words = ["-q", "-o", "python_files=parts_*.py", "-p", "no:cacheprovider", "--rootdir", root]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *sorted(HERE.glob("parts_*.py"))],
        capture_output=True, text=True, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
    assert " skipped" not in done.stdout.splitlines()[-1]


def test_without_triton_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "dense", num_hidden_layers=1)
    secateur.prune(tmp_path / "dense", output=tmp_path / "p", method="magnitude", sparsity=0.5)
    secateur.compress(tmp_path / "p", output=tmp_path / "small")
    monkeypatch.setattr("secateur.runtime.load.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="Triton") as error:
        secateur.load(tmp_path / "small", device="cuda")
    assert "expand=True" in str(error.value.remedy)
