"""One model that has learned something, trained once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from secateur.training.rewinding import Early, KeepEarly
from trained import source_ids, train, untrained

STEPS, EARLY_STEP = 300, 30


@dataclass(frozen=True)
class Trained:
    """The model; its weights at an early step; how long it was trained."""

    model: Any
    early: Early
    steps: int


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Tests must copy the model before they change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = untrained()
    hook = KeepEarly(EARLY_STEP)
    train(model, source_ids(), steps=STEPS, on_step=hook.on_step)
    torch.set_num_threads(threads)
    assert hook.early is not None
    return Trained(model, hook.early, STEPS)
