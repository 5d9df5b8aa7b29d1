"""Two processes give what one gives, and hold the zeros."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from learning import pruned_model, zeros
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("sharded_run.py")


def run(folder: Path, processes: int, steps: int) -> dict[str, torch.Tensor]:
    """The final weights of a run of so many processes."""
    places = [str(PROGRAM.parent), str(PROGRAM.parents[1]), *sys.path]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(PROGRAM), str(folder)]
    ended = subprocess.run(
        [*command, str(steps)], env=environment, timeout=540, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return load_file(folder / "final.safetensors")


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    alone = run(tmp_path / "one", 1, 12)
    together = run(tmp_path / "two", 2, 12)
    before = dict(pruned_model().named_parameters())
    moved = 0
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=2e-4, atol=2e-5)
        moved += int((weight != before[name]).sum())
    assert moved > 1000
    for name, gone in zeros(pruned_model()).items():
        assert not together[name][gone].any()
    more = run(tmp_path / "two", 1, 12)  # finished: one process reads what two have written
    assert all(torch.equal(more[name], together[name]) for name in together)
