"""What `gpu.py` measures: products, sparse tensor cores, whole models, evaluating, pruning."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.memory.memory import random_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import secateur
from secateur.evaluation.perplexity import perplexity
from secateur.models.architecture import describe
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import quantize_rows
from secateur.runtime.decode import SteppedGeneration
from secateur.runtime.kernels.gpu.bitmask import GpuBitmask
from secateur.runtime.kernels.gpu.integers import GpuIntegers
from secateur.runtime.kernels.gpu.linear import Call, Clock, GpuLinear, GpuMatrix, race
from secateur.runtime.kernels.linear import IntegerLinear
from secateur.runtime.semi_structured import stored_by_torch
from secateur.timing import alternate, seconds_of

GROUP = 64
VALUES = ("bf16", "int8", "int4")
WHOLE_LAYERS = 32
"""Layers of a model of 7 billion parameters."""


@dataclass(frozen=True)
class Scale:
    """How large everything is, and where it runs.

    `clock` is None for a GPU.
    """

    device: str
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    model: Mapping[str, Any]
    prompt_tokens: int
    steps: int
    rounds: int
    pruned_shape: str
    windows: int
    window_tokens: int
    mixture: Mapping[str, Any]
    clock: Clock | None = None

    def wait(self) -> None:
        """For everything that was launched."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def product_row(scale: Scale, shape: tuple[int, int], values: str, sparsity: float) -> dict:
    """Seconds of a product by each way, for each batch."""
    rows, columns = shape
    weight = torch.randn(rows, columns, device=scale.device).bfloat16()
    matrix = random_matrix(weight, values, sparsity)
    products = {
        "torch bf16": lambda x: functional.linear(x, weight),
        f"kernel, {values}": matrix.multiply,
        f"expanded, {values}": matrix.expanded,
    }
    if values != "bf16":
        products[f"torch {values}"] = dense_integers(weight, values)

    def calls(tokens: int) -> dict[str, Call]:
        x = torch.randn(tokens, columns, device=scale.device).bfloat16()
        return {n: lambda product=product: product(x) for n, product in products.items()}

    seconds = race(scale.batches, calls, scale.clock)
    ran = {n: {way: s for way, s in ways.items() if isfinite(s)} for n, ways in seconds.items()}
    return {"shape": [rows, columns], "bytes": matrix.nbytes, "seconds": ran}


def random_matrix(weight: Tensor, values: str, sparsity: float) -> GpuMatrix:
    """A matrix with the numbers of a dense one; of floats with random zeros."""
    device, weight = weight.device, weight.cpu()
    if values == "bf16":
        mask = torch.rand(weight.shape) >= sparsity
        return GpuBitmask.of(mask, weight[mask], device)
    if values == "int8":
        return GpuIntegers.of(IntegerLinear(*quantize_rows(weight.float())), device)
    codes, scales = GroupGrid(4, GROUP).quantize(weight.float())
    return GpuIntegers.of(IntegerLinear(codes, scales.values, GROUP), device)


def dense_integers(weight: Tensor, values: str) -> Callable[[Tensor], Tensor]:
    """torch's own product with weights of 8 or 4 bits and activations in bfloat16.

    Where torch lacks it, the call raises RuntimeError.
    """
    rows, columns = weight.shape
    if values == "int8":
        integers = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=weight.device)
        scales = torch.rand(rows, device=weight.device).bfloat16()
        return lambda x: torch._weight_int8pack_mm(x, integers, scales)

    def four_bits(x: Tensor) -> Tensor:
        if not packed:
            codes = torch.randint(0, 256, (rows, columns // 2), device=x.device).to(torch.uint8)
            packed.append(torch._convert_weight_to_int4pack(codes, 8))
            packed.append(torch.rand(columns // GROUP, rows, 2, device=x.device).bfloat16())
        return torch._weight_int4pack_mm(x, packed[0], GROUP, packed[1])

    packed: list[Tensor] = []
    return four_bits


def sparse_core_row(scale: Scale, shape: tuple[int, int]) -> dict:
    """Seconds of a 2:4 product on sparse tensor cores and of the dense one, for each prompt."""
    weight = torch.randn(shape, device=scale.device).bfloat16()
    sparse = two_of_four(weight)

    def calls(tokens: int) -> dict[str, Call]:
        x = torch.randn(tokens, shape[1], device=scale.device).bfloat16()
        return {
            "dense": lambda: functional.linear(x, weight),
            "2:4": lambda: functional.linear(x, sparse),
        }

    seconds = race(scale.prompts, calls, scale.clock)
    return {"shape": list(shape), "seconds": seconds}


def two_of_four(weight: Tensor) -> Tensor:
    """The numbers of a dense matrix with random 2:4 zeros, as torch stores them on a GPU."""
    blocks = weight.view(len(weight), -1, 4)
    kept = torch.rand(blocks.shape, device=weight.device).argsort(2) < 2
    stored: Tensor = stored_by_torch(weight.device).from_dense((blocks * kept).view_as(weight))
    return stored


def model_row(scale: Scale, storage: str) -> dict:
    """A whole model with random weights and the dense one, in turns."""
    models = {"dense": random_model(scale), storage: random_model(scale)}
    replace_linears(models[storage], storage, scale)
    ids = torch.arange(scale.prompt_tokens) % scale.model["vocab_size"]
    found: dict[str, Any] = {}
    steps = {name: SteppedGeneration(model) for name, model in models.items()}

    def turn(one: Any) -> tuple[float, list[float]]:
        prompt = timed(scale, lambda: one.prefill(ids))
        one.step(1)
        return prompt, [timed(scale, lambda: one.step(1)) for _ in range(scale.steps - 1)]

    turns = alternate([*steps.values()], turn, list, turns=scale.rounds)
    for (name, one), taken in zip(steps.items(), turns, strict=True):
        found[f"{name}, launched"] = {
            "token_seconds": median(each for _, tokens in taken for each in tokens),
            "prompt_seconds": median(prompt for prompt, _ in taken),
        }
        one.close()
    found["bytes"] = {name: stored_bytes(model) for name, model in models.items()}
    return found


def timed(scale: Scale, call: Call) -> float:
    """Seconds of one call, with everything that it launched."""
    scale.wait()
    return seconds_of(lambda: (call(), scale.wait()))


def random_model(scale: Scale) -> Any:
    """A Llama with random weights in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**scale.model), dtype=torch.bfloat16)
    return model.eval()


def replace_linears(model: Any, storage: str, scale: Scale) -> None:
    """Put the stored form of a random matrix in place of every linear of the layers.

    All linears of one shape have the same numbers, each in memory of its own; speed does not
    depend on the numbers.
    """
    made: dict[torch.Size, Any] = {}
    layers = describe(model).layers(model)
    for layer in layers:
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            shape = linear.weight.shape
            if storage == "2:4":
                sparse = two_of_four(linear.weight.detach())
                linear.weight = nn.Parameter(sparse, requires_grad=False)
            else:
                if shape not in made:
                    made[shape] = random_matrix(linear.weight.detach(), storage, 0.5)
                layer.set_submodule(name, GpuLinear(another(made[shape])))


def another(matrix: GpuMatrix) -> GpuMatrix:
    """The same matrix in memory of its own."""
    parts = {name: part for name, part in vars(matrix).items() if isinstance(part, Tensor)}
    return replace(matrix, **{name: part.clone() for name, part in parts.items()})


def stored_bytes(model: Any) -> int:
    """Bytes of the weights of a model."""
    packed = sum(x.nbytes for x in model.modules() if isinstance(x, GpuLinear))
    # torch's 2:4 tensors name the bytes of their dense shape
    held = [getattr(p, "packed", p).nbytes for p in model.parameters()]
    places = [p.meta.nbytes for p in model.parameters() if getattr(p, "meta", None) is not None]
    return packed + sum(held) + sum(places)


def windows_of(scale: Scale) -> Tensor:
    """Windows of random tokens, always the same."""
    draw = torch.Generator().manual_seed(0)
    ids = scale.model["vocab_size"]
    return torch.randint(0, ids, (scale.windows, scale.window_tokens), generator=draw)


def source_of(scale: Scale, layers: int, scratch: Path, *, mixture: bool = False) -> Path:
    """A random checkpoint; it is made once."""
    folder = scratch / f"{'mixture' if mixture else 'source'}-{layers}"
    if folder.exists():
        return folder
    if not mixture:
        random_checkpoint(folder, scale.pruned_shape, layers)
        return folder
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**{**scale.mixture, "num_hidden_layers": layers})
    with torch.device(scale.device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    return folder


def evaluate_row(scale: Scale, values: str, layers: int, scratch: Path) -> dict:
    """Load a checkpoint as `evaluate` does, and measure some windows of random tokens."""
    folder = source_of(scale, layers, scratch)
    if values != "dense":
        packed = scratch / f"{values}-{layers}"
        if not packed.exists():
            secateur.compress(folder, values=values, output=packed)
        folder = packed
    found: list[Any] = []
    loading = timed(scale, lambda: found.append(secateur.load(folder, device=scale.device)))
    windows = windows_of(scale)[:8]
    perplexity(found[0], windows[:1])  # compiles what it needs
    seconds = timed(scale, lambda: found.append(perplexity(found[0], windows)))
    return {"layers": layers, "loading_seconds": loading, "window_seconds": seconds / len(windows)}


def prune_row(
    scale: Scale, how: Mapping[str, str], layers: int, scratch: Path, *, mixture: bool = False
) -> dict:
    """Prune a random checkpoint in a process of its own; layers are alike, so a few tell of all."""
    source, output = source_of(scale, layers, scratch, mixture=mixture), scratch / "pruned"
    save_file({"input_ids": windows_of(scale)}, scratch / "windows.safetensors")
    asked = {
        "model": str(source), "output": str(output), "sparsity": 0.5, "overwrite": True,
        "calibration": str(scratch / "windows.safetensors"), "windows": scale.windows,
        "sequence_length": scale.window_tokens, "device": scale.device, **how,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.speed.gpu_rows", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-1500:]}")
    cost = json.loads(done.stdout.splitlines()[-1])
    lines = (output / "secateur" / "layers.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "layers": layers,
        "whole_layers": scale.mixture["num_hidden_layers"] if mixture else WHOLE_LAYERS,
        "seconds": cost["seconds"],
        "seconds_of_layers": [json.loads(line)["seconds"] for line in lines],
        "seconds_of_phases": cost["phases"],
        "peak_cuda_bytes": cost.get("peak_cuda_bytes"),
    }


class Phases:
    """Listens to a run: the seconds of each of its stages, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.label, self.began = "before the first stage", time.monotonic()

    def start(self, label: str, steps: int) -> None:
        """A stage begins; what came before it has ended."""
        self.finish()
        self.label = label

    def step(self, count: int = 1, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Add the time that has passed to the stage, and begin the time between stages."""
        now = time.monotonic()
        passed = self.seconds.get(self.label, 0.0) + now - self.began
        self.seconds[self.label] = round(passed, 2)
        self.label, self.began = "between stages", now


if __name__ == "__main__":
    phases = Phases()
    pruned = secateur.prune(**json.loads(sys.argv[1]), progress=phases)
    phases.finish()
    print(json.dumps({**pruned.to_json()["cost"], "phases": phases.seconds}))
