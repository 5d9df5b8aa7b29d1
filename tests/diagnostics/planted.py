"""Tiny pruned run folders, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch import Tensor
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.models.skeleton import quiet_transformers
from secateur.reporting.diagnose import DiagnoseResult
from secateur.runs.measured import Finding


class Pair:
    """A dense tiny model, the same pruned, and windows to read."""

    def __init__(self, folder: Path) -> None:
        self.dense, self.pruned = folder / "dense", folder / "pruned"
        self.windows = folder / "windows.safetensors"

    def diagnose(self, *, with_dense: bool = False, **options: Any) -> DiagnoseResult:
        """Diagnose the pruned model, beside the dense one if wanted."""
        if with_dense:
            options |= {"dense": self.dense, "text": self.windows}
        return secateur.diagnose(self.pruned, **options)


def make_pair(folder: Path, family: str = "llama", **options: Any) -> Pair:
    """Prune a tiny model: SparseGPT to one half unless other options are given."""
    pair = Pair(folder)
    with quiet_transformers():
        tiny_model(family).save_pretrained(pair.dense)
    tiny_tokenizer().save_pretrained(pair.dense)
    save_windows(tiny_windows(8, 32), pair.windows)
    options = options or {"method": "sparsegpt", "sparsity": 0.5}
    secateur.prune(pair.dense, output=pair.pruned, calibration=pair.windows, **options)
    return pair


def edit(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    """Change one stored tensor in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite(file: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file, or each line of a JSONL file."""
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    values = [json.loads(line) for line in lines]
    for value in values:
        change(value)
    file.write_text("\n".join(json.dumps(value) for value in values) + "\n")


def found(diagnosis: DiagnoseResult, kind: str) -> list[Finding]:
    """The findings of one kind."""
    return [x for x in diagnosis.findings if x.id == kind]
