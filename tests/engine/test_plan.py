"""Plans against the memory of the device that computes, and against that of its host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import tiny_llama
from zoo import tiny_model, tiny_windows

from secateur.calibration.continuation import (
    DRAWN_AT_ONCE,
    kernels_write,
    opened_for_writing,
    writing_bytes,
)
from secateur.engine.plan import Plan, fitting, fitting_plan, memory_budget, with_program
from secateur.engine.plan_memory import (
    distilling_bytes,
    learning_needs,
    logits_bytes,
    pruning_needs,
    workspace_bytes,
)
from secateur.engine.prune.tasks import LinearTask, Settings, SolveMemory
from secateur.engine.stream.halted_forwards import LiveTensors
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.machine import fast_dtype, fast_matmuls
from secateur.models.checkpoint import CheckpointReader
from secateur.models.opening import load_whole
from secateur.models.skeleton import empty_cache
from secateur.models.targets import CheckpointTarget
from secateur.recipes.train import TrainRecipe
from secateur.runtime.decode import SlotDecoder
from secateur.sparsity.methods import compose
from secateur.training.batches import Batch, Batches
from secateur.training.divergences import last_hidden
from secateur.training.objectives import Distil, ModelTeacher
from secateur.training.process_group import ProcessGroup
from secateur.training.setup import plan_needs
from secateur.training.training_plan import TrainingPlan

GIB = 2**30
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """10 GiB free on the GPU, 100 on the host."""
    free: dict[str, float] = {"gpu": 10 * GIB, "host": 100 * GIB}

    def host() -> Any:
        return type("Memory", (), {"available": free["host"]})

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["gpu"], 80 * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", host)
    monkeypatch.setattr("secateur.engine.plan.resident_bytes", lambda: 0)
    return free


def plan(*, on_gpu: bool, activations: str = "memory", **learning: int) -> Plan:
    """1 GiB of everything, 5 of hidden states if they are in memory, 20 of halted forwards if these
    are not repeated.
    """
    there = activations != "disk"
    halted = there and (not on_gpu or activations == "gpu")
    needs = pruning_needs(
        GIB, 5 * GIB, (GIB, 20 * GIB * halted), SolveMemory(GIB, GIB, (3, 4)),
        Settings(activations=activations), on_gpu=on_gpu,
    )  # fmt: skip
    for need in learning_needs(0, [], sweeps=False):
        needs.append(replace(need, bytes=learning.get(need.name, 0) * GIB))
    program, *others = with_program(needs, on_gpu)
    return Plan((replace(program, bytes=GIB), *others), on_gpu)


def fitted(device: torch.device, max_memory: int | None = None, **options: Any) -> str:
    def planned(activations: str) -> Plan:
        return plan(on_gpu=device.type == "cuda", activations=activations, **options)

    return fitting_plan(planned, device, "auto", memory_budget(max_memory, device))[1]


def test_peaks_say_what_lies_where() -> None:
    assert plan(on_gpu=False).peak_bytes == 29 * GIB == plan(on_gpu=False).host_peak_bytes
    there = plan(on_gpu=True)
    assert there.peak_bytes == 3 * GIB  # layer, running forward, solver
    assert there.host_peak_bytes == 7 * GIB  # process, a layer on its way, hidden states
    whole = plan(on_gpu=True, distilling=9, loading=40)
    assert (whole.peak_bytes, whole.host_peak_bytes) == (9 * GIB, 41 * GIB)
    assert there.to_json()["host_peak"] == 7 * GIB
    kept = plan(on_gpu=True, activations="gpu")
    assert (kept.peak_bytes, kept.host_peak_bytes) == (28 * GIB, 2 * GIB)


def test_a_gpu_keeps_what_fits_in_it(machine: dict[str, float]) -> None:
    machine["gpu"] = 40 * GIB
    assert fitted(CUDA) == "gpu"
    assert fitted(CUDA, 20 * GIB) == "memory"
    assert fitted(CPU) == "memory"
    with pytest.raises(RecipeError, match="cpu computes"):
        fitting_plan(lambda place: plan(on_gpu=False), CPU, "gpu", memory_budget(None, CPU))


def test_a_plan_for_a_gpu_is_held_against_the_memory_of_the_gpu(machine: dict[str, float]) -> None:
    assert fitted(CUDA) == "memory"
    machine["gpu"] = 3.5 * GIB
    with pytest.raises(MemoryBudgetError, match=r"3\.00 GiB on the GPU"):
        fitted(CUDA)


def test_the_host_of_a_gpu_is_checked_too(machine: dict[str, float]) -> None:
    machine["host"] = 5 * GIB
    assert fitted(CUDA) == "disk"  # hidden states are on the host
    machine["host"] = GIB
    with pytest.raises(MemoryBudgetError, match=r"2\.00 GiB on the host"):
        fitted(CUDA)


def test_a_budget_bounds_the_device_that_computes(machine: dict[str, float]) -> None:
    with pytest.raises(MemoryBudgetError, match=r"GPU.* 2\.00 GiB"):
        fitted(CUDA, 2 * GIB)
    assert fitted(CUDA, 4 * GIB) == "memory"  # the host needs 7 of 80 GiB
    assert fitted(CPU, 4 * GIB) == "disk"
    assert fitted(CPU, 30 * GIB) == "memory"
    assert memory_budget(4 * GIB, CUDA).host == pytest.approx(80 * GIB)
    with pytest.raises(MemoryBudgetError, match=r"; distillation takes 9\.00 GiB") as error:
        fitted(CUDA, distilling=9)
    assert "--distill-epochs 0" in str(error.value.remedy)
    assert "pruning a layer" not in error.value.what  # which needs 3 GiB


def test_no_remedy_is_named_that_cannot_be_enough() -> None:
    """Where the program itself is larger than the budget, another method brings nothing."""
    with pytest.raises(MemoryBudgetError, match="the program itself") as error:
        fitted(CPU, GIB // 2)
    assert error.value.remedy == "raise --max-memory"
    with pytest.raises(MemoryBudgetError, match=r"most of it: ") as error:
        fitted(CPU, int(2.5 * GIB))
    assert "--method wanda" in str(error.value.remedy)


def test_a_training_is_held_against_the_memory_of_its_device(
    machine: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.training.setup.resident_bytes", lambda: GIB)
    folder, batches = tiny_llama(tmp_path), Batches(tiny_windows(4, 20), 4)
    target, recipe = CheckpointTarget(CheckpointReader(folder), None, CPU), TrainRecipe(model="m")
    here, there = (
        plan_needs(recipe, target, None, batches, TrainingPlan(steps=1), ProcessGroup(device))
        for device in (CPU, CUDA)
    )
    assert here.peak_bytes == here.host_peak_bytes == sum(here.sizes.values())
    assert there.peak_bytes == sum(there.sizes.values()) - GIB
    assert there.host_peak_bytes == GIB + there.sizes["weights"]

    def taken(plan: Plan, device: torch.device) -> tuple[Plan, int]:
        return fitting(lambda way: plan, {1: "{}", 2: "or {}"}, memory_budget(None, device), "")

    assert taken(there, CUDA) == (there, 1)
    machine["gpu"] = there.peak_bytes
    assert taken(here, CPU)[0] is here
    with pytest.raises(MemoryBudgetError, match="on the GPU"):
        taken(there, CUDA)
    machine["gpu"], machine["host"] = 80 * GIB, GIB
    with pytest.raises(MemoryBudgetError, match="on the host"):
        taken(there, CUDA)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "mamba", "qwen3_next"])
def test_the_cache_of_a_text_that_the_model_writes_is_counted(family: str) -> None:
    model: Any = tiny_model(family).to(torch.bfloat16)
    windows, given = tiny_windows(2, 20), empty_cache(model)
    with torch.no_grad():
        model(input_ids=windows, use_cache=True, **given)
    [cache] = given.values()
    held = sum(x.nbytes for layer in cache.layers for x in flat(vars(layer).values()) if x.ndim > 1)
    weights, logits = 2 * sum(p.numel() for p in model.parameters()), 2 * 96 * (2 + 8)
    planned = writing_bytes(model, CUDA, 20, torch.bfloat16, 2)
    # and one layer's keys and values again, which grow by a copy
    assert held <= planned - weights - logits <= 2 * held


def test_windows_by_the_kernels_take_a_model_of_int8(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", tie_word_embeddings=False, head_dim=16)
    target = CheckpointTarget(CheckpointReader(folder), None, CPU)
    if not kernels_write(target.model, target.device, 40):
        pytest.skip("no kernels for many slots here")
    model = opened_for_writing(folder, CPU, 40)
    decoder = SlotDecoder(model, 40, 5, cache="bf16")
    matrices = {id(x): x for m in model.modules() if (x := getattr(m, "matrix", None))}
    stored = sum(matrix.rows * matrix.columns for matrix in matrices.values())
    others = sum(p.numel() * p.element_size() for p in model.parameters())
    taken = stored + others + decoder.cache.nbytes + 4 * 5 * 96
    planned = writing_bytes(target.model, CPU, 40, target.dtype, 5)
    beside = 12 * DRAWN_AT_ONCE  # a draw
    assert taken + beside < planned < 2 * taken + 8 * stored + beside


def test_a_distillation_counts_a_tied_head_once(tmp_path: Path) -> None:
    """In a skeleton the head has a parameter of its own, also where it is the embedding."""
    planned = []
    for tied in (True, False):
        folder = tiny_llama(tmp_path / str(tied), tie_word_embeddings=tied)
        target = CheckpointTarget(CheckpointReader(folder), None, CPU)
        planned.append(distilling_bytes(target, target, tiny_windows(1, 20)))
    head = 4 * target.model.lm_head.weight.numel()
    assert planned[1] - planned[0] == 2 * head  # of the teacher and of the student


@pytest.mark.parametrize("exact", [False, True])
def test_logits_are_counted_in_blocks(
    tmp_path: Path, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the tensors that live while a student and its teacher compute the loss."""
    monkeypatch.setattr("secateur.machine.LOGITS_BYTES", 2**21)
    monkeypatch.setattr("secateur.training.divergences.CHUNKS", 128)
    if exact:
        monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: False)
    folder = tiny_llama(tmp_path, vocab_size=4096)
    target = CheckpointTarget(CheckpointReader(folder), None, CPU)
    model = load_whole(folder, CPU).float()
    teacher = load_whole(folder, CPU, dtype=fast_dtype(CPU))
    model.get_output_embeddings().requires_grad_(False)  # the layers learn
    objective = Distil.between(model, ModelTeacher(teacher), next_token=0.5)
    weights, planned, measured = [*model.parameters(), *teacher.parameters()], [], []
    for tokens in (128, 512):
        ids = tiny_windows(1, tokens)
        planned.append(logits_bytes(target, ids))
        with LiveTensors(weights, find_peak=True) as live, fast_matmuls(CPU):
            objective(model, Batch(ids, (0,)))
            whole = live.peak_bytes
        with LiveTensors(weights, find_peak=True) as live, fast_matmuls(CPU):
            last_hidden(model, objective.head, ids)
        measured.append(whole - live.peak_bytes)
    assert planned[0] == planned[1]
    assert 0.4 * planned[1] < measured[1] < planned[1]


def flat(values: Any) -> list[torch.Tensor]:
    """All tensors among values, and in tables among them."""
    found: list[torch.Tensor] = []
    for value in values:
        found += flat(value.values()) if isinstance(value, dict) else []
        found += [value] if torch.is_tensor(value) else []
    return found


def test_a_gpu_has_room_for_the_workspace_of_a_factorisation() -> None:
    shapes = {"q_proj": (64, 32), "down_proj": (32, 96), "dense": (8, 4096)}
    tasks = {
        method: {
            name: LinearTask(name, shape, compose(method, "unstructured"), 0.5 * (name != "dense"))
            for name, shape in shapes.items()
        }
        for method in ("sparsegpt", "wanda")
    }
    assert workspace_bytes(tasks["sparsegpt"], asymmetric=False) == 4 * 96 * 96
    assert workspace_bytes(tasks["wanda"], asymmetric=False) == 0
    assert workspace_bytes(tasks["wanda"], asymmetric=True) == 4 * 96 * 96  # targets need a gram
