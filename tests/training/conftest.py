"""One model that has learned something, trained once for all tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trained import source_ids, train, untrained


@pytest.fixture(scope="session")
def trained() -> Any:
    """Tests must copy the model before they change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = untrained()
    train(model, source_ids(), steps=300)
    torch.set_num_threads(threads)
    return model
