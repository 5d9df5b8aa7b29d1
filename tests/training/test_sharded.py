"""Two processes give what one gives, and hold the zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import save_tiny
from trained import source_text

import secateur
from secateur.models.sources import resolve
from secateur.training import memory

COUNTING = Path(__file__).with_name("resident_run.py")

WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "steps": 4, "windows": 16, "batch": 2, "sequence_length": 16, "validation_windows": 2,
    "validations": 1, "fast_matmuls": False, "optimizer": "Adam", "learning_rate": 5e-3,
}  # fmt: skip
SLACK = 2**16
"""Bytes for buffers and what else is small."""


def start(program: Path, processes: int, *words: object) -> None:
    """Run a program in so many processes."""
    places = [str(program.parent), str(program.parents[1]), *sys.path]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(program)]
    ended = subprocess.run(
        [*command, *map(str, words)], env=environment, timeout=540, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student pruned from it, and a text."""
    place = tmp_path_factory.mktemp("sharded")
    save_tiny(place / "dense", **WIDE)
    secateur.prune(place / "dense", output=place / "pruned", method="magnitude", sparsity=0.5)
    (place / "text.txt").write_text(source_text()[:60_000])
    return place


@pytest.mark.slow
def test_no_process_has_more_than_its_part_and_one_layer(places: Path, tmp_path: Path) -> None:
    options = {
        **OPTIONS,
        "text": str(places / "text.txt"),
        "teacher": str(places / "dense"),
        "next_token": 0.5,
    }
    start(COUNTING, 2, "train", places / "pruned", tmp_path / "two", json.dumps(options))
    stored = load_file(places / "pruned" / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    layer = sum(size for name, size in sizes.items() if "layers.0." in name)
    half = sum(sizes.values()) // 2
    masks = sum(sizes[n] // 4 for n, x in stored.items() if x.ndim == 2 and not x.all()) // 2
    for rank in range(2):
        taken = json.loads(Path(f"{tmp_path / 'two'}.json.{rank}").read_text())
        assert taken["reading"] <= half + layer + SLACK
        # The teacher is in bfloat16 where that is faster; its embeddings and head stay gathered.
        assert taken["set_up"] <= half + masks + half + SLACK
        # Gradients and two moments; of a layer two buffers and the weights, as FSDP2 has them.
        assert taken["steps"] <= 4 * half + masks + half + 3 * layer + taken["forward"] + SLACK
        assert taken["writing"] <= 4 * half + masks + half + max(sizes.values()) + SLACK
        assert taken["weights"] == half
        parts = ("weights", "gathered", "optimizer", "teacher", "masks", "forward")
        planned = sum(taken[name] for name in parts)
        assert 0.6 * planned <= taken["steps"] <= planned
    secateur.train(places / "pruned", output=tmp_path / "one", **options)
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "two"))
    resumed = secateur.train(places / "pruned", output=tmp_path / "two", resume=True, **options)
    assert resumed.manifest.processes == 2  # one process reads what two have written
    moved = 0
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=2e-4, atol=2e-5)
        moved += int((weight != stored[name]).sum())
        assert not two[name][stored[name] == 0].any() or stored[name].ndim < 2
    assert moved > 1000


def test_a_process_holds_its_part_of_a_teacher_and_two_whole_layers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", num_hidden_layers=6)
    teacher = resolve(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())  # tied ones once
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    alone, shared = (
        memory._teacher_bytes(teacher, SimpleNamespace(count=n, device=torch.device("cpu")), False)
        for n in (1, 3)
    )
    assert shared * count == alone * (count - 6 * layer + 2 * layer + 2 * layer)
