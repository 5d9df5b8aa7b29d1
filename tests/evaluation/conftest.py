"""A tiny model, the same with a third of its values gone, and a text to judge both on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "dense", max_position_embeddings=512)


@pytest.fixture
def pruned(tmp_path: Path, dense: Path) -> Path:
    """The dense model with a third of its values gone, in a folder of a run."""
    folder = tmp_path / "pruned"
    shutil.copytree(dense, folder)
    tensors = load_file(dense / "model.safetensors")
    torch.manual_seed(1)
    for tensor in tensors.values():
        tensor.mul_(torch.rand_like(tensor) > 0.3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "secateur").mkdir()
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the stone by the river, a lamp on paper. " * 12)
    return file
