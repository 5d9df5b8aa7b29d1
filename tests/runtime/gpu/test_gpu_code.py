"""The GPU's kernels compile to machine code for A100 and H100, and nothing is spilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[gpu]'")

FEW = ("bfloat16-one", "int4-many", "bfloat16-2:4-1")
ALL = tuple(
    f"{values}-{how}"
    for values in ("bfloat16", "float16", "int8", "int4")
    for how in ("one", "many", "expand")
) + tuple(
    f"{values}-{pattern}-{tokens}"
    for values in ("bfloat16", "float16")
    for pattern in ("2:4", "6:8")
    for tokens in (1, 2, 4)
)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        (90, FEW),
        pytest.param(90, ALL, marks=pytest.mark.slow),
        pytest.param(80, ALL, marks=pytest.mark.slow),
    ],
    ids=["90-few", "90-all", "80-all"],
)
def test_kernels_compile_and_spill_nothing(
    architecture: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    program = Path(__file__).with_name("compiled.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, program, str(architecture), *names],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == set(names)
    for name, usage in found.items():
        assert usage["spilled"] == 0, name
        # so many registers leave room for three programs of 128 threads on a multiprocessor
        assert usage["registers"] <= 168, name
        assert usage["shared"] <= 16 * 2**10, name
        assert usage["tensor_cores"] == name.endswith("many"), name
