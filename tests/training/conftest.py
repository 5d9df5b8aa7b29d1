"""One model that has learned something, trained once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import source_ids, train, untrained

from secateur.training.pruning import KeepEarly

STEPS, EARLY_STEP = 300, 30


@dataclass(frozen=True)
class Trained:
    """The model; the file of its weights at an early step; that step; the steps of all."""

    model: Any
    early: Path
    early_step: int
    steps: int


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Tests must copy the model before they change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = untrained()
    early = tmp_path_factory.mktemp("trained") / "early.safetensors"
    hook = KeepEarly(EARLY_STEP, early)
    train(model, source_ids(), steps=STEPS, on_step=hook.on_step)
    torch.set_num_threads(threads)
    return Trained(model, early, EARLY_STEP, STEPS)
