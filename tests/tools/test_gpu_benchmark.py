"""The benchmark of GPUs without a GPU: which rows it measures, when it stops, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmarks.speed import gpu


def test_rows_are_measured_once_until_time_is_short() -> None:
    kept: list[dict[str, Any]] = []

    def fails() -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    rows = [
        gpu.Row("a", 1, lambda: {"seconds": 1}),
        gpu.Row("known", 1, fails),
        gpu.Row("long", 1e6, fails),
        gpu.Row("b", 1, fails),
    ]
    left = gpu.measure_all(rows, {"known"}, time.monotonic() + 60, kept.append)
    assert left == ["long"]
    assert [row["name"] for row in kept] == ["a", "b"]
    assert kept[1]["failure"] == "RuntimeError: no such kernel"


def test_the_table_compares_with_the_dense_way() -> None:
    product = {"16": {"torch bf16": 4e-6, "ours": 2e-6}}
    decode = {"token_seconds": 0.02, "prompt_seconds": 0.1}
    phases = {"pruning": 20.2, "copying the model": 6, "auditing": 3}
    pruned = {"layers": 4, "whole_layers": 32, "seconds": 30, "seconds_of_layers": [5, 5, 6, 4],
              "seconds_of_phases": phases}  # fmt: skip
    found = gpu.table(
        [
            {"name": "product 4x4 bf16 50%", "seconds": product},
            {"name": "model int8", "dense, launched": decode,
             "int8, launched": {"token_seconds": 0.01, "prompt_seconds": 0.2}},
            {"name": "prune alps 4", **pruned, "peak_cuda_bytes": 3 * 2**30},
            {"name": "prune mixture-wanda 4", **pruned, "whole_layers": 48,
             "peak_cuda_bytes": None},
            {"name": "evaluate int4", "layers": 4, "loading_seconds": 9, "window_seconds": 0.05},
            {"name": "model int4", "failure": "RuntimeError: full\nof it"},
        ]
    )  # fmt: skip
    longest = "pruning 20 s, copying the model 6 s, auditing 3 s"
    assert found == [
        ["product 4x4 bf16 50%, 16 tokens", "torch bf16", "4.0 µs", "1.00 ×"],
        ["product 4x4 bf16 50%, 16 tokens", "ours", "2.0 µs", "2.00 ×"],
        ["model int8", "dense, launched", "50.0 tokens/s", "1.00 ×, prompt 1.00 ×"],
        ["model int8", "int8, launched", "100.0 tokens/s", "2.00 ×, prompt 0.50 ×"],
        # 10 seconds around the layers, and 32 layers of 5
        ["prune alps 4", "from 4 layers", "2.8 min of 15", "3.0 GiB", longest],
        ["prune mixture-wanda 4", "from 4 layers", "4.2 min", "", longest],
        ["evaluate int4", "4 layers", "50 ms a window"],
        ["model int4", "failed", "RuntimeError: full"],
    ]


@pytest.mark.slow
def test_rows_of_every_kind_run_in_the_interpreter(tmp_path: Path) -> None:
    """And a second call finds all of them."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install '.[gpu]'")
    module = ["-m", "benchmarks.speed.gpu", "--dry"]
    command = [sys.executable, *module, "--results", tmp_path, "--minutes", "30"]
    command += ["--layers", "2", "--few", "1"]
    command += ["--only", "product", "model int8", "evaluate", "prune wanda"]
    command += ["prune mixture"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert not [row for row in rows if "failure" in row]
    kinds = Counter(row["name"].split()[0] for row in rows)
    assert kinds == {"product": 4, "model": 1, "evaluate": 2, "prune": 4}
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert not [row for row in rows if f"{row['name']}: " in again.stderr]
