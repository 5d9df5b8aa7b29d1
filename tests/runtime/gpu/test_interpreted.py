"""Runs the GPU's kernels in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and torch may have imported it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from torch import nn

import secateur
from secateur.runtime.kernels.linear import IntegerLinear, PackedLinear

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


@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_multiplies_by_triton_or_torch(
    triton: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never by the kernels of the CPU. A meta device takes the place of the GPU."""
    save_tiny(tmp_path / "dense", num_hidden_layers=1)
    secateur.compress(tmp_path / "dense", output=tmp_path / "small", values="int8")
    monkeypatch.setattr("secateur.runtime.load.find_spec", lambda name: triton or None)
    by_triton: list[torch.device] = []
    monkeypatch.setattr(
        "secateur.runtime.load.install_on_gpu", lambda *args: by_triton.append(args[-1])
    )
    move = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device: move(self, "meta"))
    model = secateur.load(tmp_path / "small", device="cuda:1")
    assert by_triton == ([torch.device("cuda", 1)] if triton else [])
    kinds = {type(module) for module in model.modules()}
    assert PackedLinear not in kinds
    assert (IntegerLinear in kinds) == (not triton)
