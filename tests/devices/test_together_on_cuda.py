"""Two processes, each on a pretended GPU of its own, make the model that one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tensors_of
from trained import source_text

from parallel.together import environment, free_port
from secateur.recipes.prune import presets
from secateur.sparsity.allocation import allocations

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PATHS = [HERE.parents[1] / "src", HERE, *(HERE.parent / name for name in ("parallel", "support"))]

Cases = dict[str, dict[str, Any]]
EFFORTS: Cases = {
    f"{effort} {model}": {"effort": effort, "model": model}
    for effort in presets
    for model in ("dense", "experts")
}
ALLOCATIONS: Cases = {
    how: {"effort": "fast", "allocation": how, "model": "dense"} for how in allocations.names()
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a text."""
    place = tmp_path_factory.mktemp("together-on-cuda")
    save_tiny(place / "dense", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    save_tiny(place / "experts", "mixtral", num_hidden_layers=2)
    (place / "text.txt").write_text(source_text()[:20_000])
    return place


def recipe(place: Path, output: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A short run."""
    text = {"source": str(place / "text.txt"), "windows": 4, "sequence_length": 16}
    learned = (
        {"distillation": {"tokens": 64}} if presets[case["effort"]].get("distillation") else {}
    )
    return {
        **case, **learned, "model": str(place / case["model"]), "output": str(output),
        "sparsity": 0.5, "memory": {"micro_batch_tokens": 32}, "calibration": text,
        "device": "cuda",
    }  # fmt: skip


def carry_out(library: Path, count: int, file: Path) -> None:
    """Carry out the recipes of a file in so many processes."""
    port, started = free_port(), []
    for rank in range(count):
        variables = environment(rank, count, port) if count > 1 else {"OMP_NUM_THREADS": "1"}
        paths = {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
        with (file.parent / f"{count}-{rank}.txt").open("w") as printed:
            started.append(
                subprocess.Popen(
                    [sys.executable, HERE / "together_on_cuda.py", library, file],
                    env={**os.environ, **variables, **paths}, stdout=printed, stderr=printed,
                )
            )  # fmt: skip
    try:
        for rank, process in enumerate(started):
            printed = file.parent / f"{count}-{rank}.txt"
            assert process.wait(1200) == 0, printed.read_text()[-3000:]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("cases", [EFFORTS, ALLOCATIONS], ids=["efforts", "allocations"])
def test_two_processes_make_the_model_of_one(
    library: Path, place: Path, tmp_path: Path, cases: Cases
) -> None:
    for count in (1, 2):
        file = tmp_path / f"recipes-{count}.json"
        values = [recipe(place, tmp_path / f"{n}-{count}", case) for n, case in cases.items()]
        file.write_text(json.dumps([["prune", each] for each in values]))
        carry_out(library, count, file)
    for name, case in cases.items():
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        ours, dense = tensors_of(two), tensors_of(place / case["model"])
        assert sum(int((ours[n] == 0).sum() - (dense[n] == 0).sum()) for n in ours) > 2000, name
