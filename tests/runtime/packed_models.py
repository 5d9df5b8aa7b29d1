"""Tiny pruned models, compressed into folders that can be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import split_shards, tiny_tokenizer
from zoo import CONFIGS, matrices, weight_of

import secateur
from secateur.models.skeleton import quiet_transformers
from secateur.runtime.kernels.dispatch import KernelChoice
from secateur.runtime.speculative import Pace

IDS = torch.tensor([[5, 17, 80, 33, 4, 61, 29], [9, 40, 77, 12, 90, 3, 55]])


def pruned_folder(
    folder: Path,
    family: str = "llama",
    *,
    shards: int = 1,
    pattern: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    sparsity: float = 0.5,
    **overrides: Any,
) -> Path:
    """A random model of the zoo with zeros in its decoder; norms and biases are not neutral."""
    config = CONFIGS[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
        for module in matrices(model).values():
            weight = weight_of(module)
            if pattern is None:
                weight[torch.rand(weight.shape) < sparsity] = 0
            else:
                groups = torch.rand(weight.numel() // pattern[1], pattern[1]).argsort(1)
                weight[(groups >= pattern[0]).view(weight.shape)] = 0
    with quiet_transformers():
        model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if shards > 1:
        split_shards(folder, shards)
    return folder


def packed_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A pruned model of the zoo, compressed; options of `secateur.compress` or `pruned_folder`.

    The values stay in the dtype of the model unless others are named.
    """
    names = ("format", "values", "group_size", "embeddings", "archive")
    wanted = {name: options.pop(name) for name in names if name in options}
    pruned_folder(folder / "dense", family, **options)
    wanted.setdefault("values", "keep")
    secateur.compress(folder / "dense", output=folder / "packed", **wanted)
    return folder / "packed"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the timings of this moment, matrices stay packed and few tokens take the kernel."""
    monkeypatch.setattr("secateur.runtime.install.choose", lambda *_: KernelChoice(64, 10.0))


class Eager(Pace):
    """Proposes as many tokens as it may, whatever they cost."""

    def awake(self) -> bool:
        return True

    def value(self, texts: int) -> float:
        return float("inf")


def python(
    script: str, *words: object, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh process; what it prints and how it ends."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
