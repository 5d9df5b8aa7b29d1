"""An 8B learns on one GPU of 80 GB, a 70B on eight: by the plan, with files that are all holes."""

from __future__ import annotations

import json
import re
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers

from secateur.engine.plan import Plan, fitting, memory_budget
from secateur.errors import MemoryBudgetError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import CheckpointTarget
from secateur.recipes.train import TrainRecipe
from secateur.training.batches import Batches
from secateur.training.process_group import ProcessGroup
from secateur.training.setup import plan_needs
from secateur.training.training_plan import TrainingPlan, shared_batch

GIB = 2**30
CUDA = torch.device("cuda", 0)
SHAPES: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
}  # fmt: skip
"""Llama 3.1's."""


def write_holes(folder: Path, tensors: dict[str, Any]) -> None:
    """Write files of bfloat16 tensors that take no room on the disk, one for each decoder layer."""
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[2] if ".layers." in name else name
        files.setdefault(f"{part}.safetensors", {})[name] = tensor
    for file, held in files.items():
        header, end = {}, 0
        for name, tensor in held.items():
            start, end = end, end + 2 * tensor.numel()
            header[name] = {
                "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end],
            }  # fmt: skip
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    places = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, shape in SHAPES.items():
        found[name] = tmp_path_factory.mktemp(name)
        config = transformers.LlamaConfig(
            **shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
            dtype="bfloat16", architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(found[name])
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        write_holes(found[name], model.state_dict())
    return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """GPUs of 80 GB, of which 79 GiB are free, and a host with 200 GiB."""
    free = {"host": 200.0 * GIB}
    for name, answer in {
        "torch.cuda.mem_get_info": lambda device: (79 * GIB, 80 * GIB),
        "torch.cuda.is_bf16_supported": lambda **options: True,
        "secateur.training.setup.resident_bytes": lambda: GIB,
        "secateur.engine.plan.resident_bytes": lambda: GIB,
    }.items():
        monkeypatch.setattr(name, answer)
    memory = lambda: SimpleNamespace(available=free["host"])  # noqa: E731
    monkeypatch.setattr(psutil, "virtual_memory", memory)
    return free


def planned(
    folder: Path, processes: int, *, teacher: bool = False, checkpointing: bool = False
) -> tuple[Plan, Plan, bool]:
    """The plan with everything on the GPU, the one that fits, and whether that is on the host."""
    target = CheckpointTarget(CheckpointReader(folder), None, torch.device("cpu"))
    size = shared_batch(None, processes)
    plan_of = partial(
        plan_needs,
        TrainRecipe(model=str(folder)),
        target,
        SimpleNamespace(folder=folder) if teacher else None,
        Batches(torch.zeros(size, 512, dtype=torch.long), size),
        TrainingPlan(steps=1, gradient_checkpointing=checkpointing),
    )
    group = ProcessGroup(CUDA, count=processes, here=processes)
    ways = {group: "{}", group.holding(True): "{}"}
    plan, way = fitting(plan_of, ways, memory_budget(None, CUDA, processes), "")
    return plan_of(group), plan, way.on_host


@pytest.mark.parametrize(
    ("name", "processes", "options", "host", "before", "after"),
    [
        ("8B", 1, {}, 200, 163, 32),
        ("8B", 1, {"teacher": True}, 200, 180, 48),
        ("70B", 8, {}, 1900, 179, 40),
        ("70B", 8, {"teacher": True, "checkpointing": True}, 1900, 178, 40),
    ],
    ids=str,
)
def test_what_is_too_much_for_the_gpu_learns_from_the_host(
    name: str,
    processes: int,
    options: dict[str, bool],
    host: int,
    before: int,
    after: int,
    folders: dict[str, Path],
    machine: dict[str, float],
) -> None:
    machine["host"] = host * GIB
    here, there, on_host = planned(folders[name], processes, **options)
    assert on_host
    assert here.peak_bytes / GIB == pytest.approx(before, abs=1)  # of 63 that it may use
    assert there.peak_bytes / GIB == pytest.approx(after, abs=1)
    counts = [
        -(-entry.shape[0] * (entry.shape[1] if len(entry.shape) > 1 else 1) // processes)
        for entry in CheckpointReader(folders[name]).entries.values()
    ]
    pinned = sum(2 ** (4 * count - 1).bit_length() for count in counts)
    moments = 8 * sum(counts)
    assert there.sizes["weights"] == pinned
    assert there.sizes["optimizer"] == pytest.approx(pinned + moments, rel=1e-6)
    held = there.sizes["weights"] + there.sizes["optimizer"] + there.sizes["masks"] + GIB
    assert there.host_peak_bytes == held


def test_where_the_gpu_has_room_nothing_moves(
    folders: dict[str, Path], machine: dict[str, float]
) -> None:
    machine["host"] = 1900.0 * GIB
    here, chosen, on_host = planned(folders["8B"], 8, teacher=True)
    assert not on_host
    assert chosen == here
    assert here.sizes["rounded"] < 2**20 < here.sizes["gathered"]  # norms


def test_a_host_without_room_is_refused_with_both_numbers(
    folders: dict[str, Path], machine: dict[str, float]
) -> None:
    machine["host"] = 100.0 * GIB
    with pytest.raises(MemoryBudgetError) as error:
        planned(folders["8B"], 1)
    numbers = [float(x) for x in re.findall(r"(\d+\.\d+) GiB", error.value.what)]
    assert numbers[:4] == pytest.approx([163, 63, 133, 81], abs=1)
