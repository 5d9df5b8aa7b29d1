"""The GPU's kernels compile to machine code without a GPU, and take no more than these numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[gpu]'")

ARCHITECTURES = (80, 89, 90, 100)
"""A100, L40S, H100, B200."""

LIMITS = """
bfloat16-one     60/13.3   48/13.4   56/13.1   48/13.7
bfloat16-many    96/24.7   86/25.0   80/25.8   72/26.8
bfloat16-expand  48/17.2   48/18.0   40/18.0   40/18.0
bfloat16-round   23/68.0   25/68.0   23/70.0   23/68.0
int8-few         80/2.0    76/2.0    78/2.0    78/2.0
int8-many        128/5.2   110/5.3   128/6.1   254/24.1
int4-few         72/2.7    72/2.7    80/2.8    79/2.7
int4-many        153/8.1   150/8.1   166/8.4   192/15.6
int4x2-few       94/3.5    78/3.6    86/3.6    84/3.3
int4x2-many      152/11.1  151/11.1  170/11.7  227/17.5
"""
"""Registers of a thread, and instructions of a thread for each weight, by architecture."""

TABLE = {name: cells for name, *cells in map(str.split, LIMITS.strip().splitlines())}
FEW = ("bfloat16-one", "bfloat16-expand", "bfloat16-round", "int4-few")
ALL = tuple(TABLE) + tuple(x[1:] for x in TABLE if x.startswith("bfloat16"))


@pytest.mark.parametrize(
    ("architecture", "names"),
    [(90, FEW), *(pytest.param(x, ALL, marks=pytest.mark.slow) for x in ARCHITECTURES)],
    ids=["90-few", *(f"{x}-all" for x in ARCHITECTURES)],
)
def test_kernels_compile_to_so_much(
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
        # of float16 the limits are those of bfloat16
        cell = TABLE[name if name in TABLE else f"b{name}"]
        registers, instructions = cell[ARCHITECTURES.index(architecture)].split("/")
        assert usage["spilled"] == 0, name
        assert usage["registers"] <= int(registers), name
        assert usage["instructions"] <= float(instructions), name
        assert usage["shared"] <= 40 * 2**10, name
        tensor_cores = name.startswith("int") or name.endswith("many")
        assert usage["tensor_cores"] == tensor_cores, name
