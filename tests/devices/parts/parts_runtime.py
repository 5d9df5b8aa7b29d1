"""What decodes on a GPU: a step waits for nothing, so that it can be captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pretended import OnCuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import tiny_model

from secateur.runtime.captured import CapturedGeneration


class NothingCrosses(TorchDispatchMode):
    """Refuses copies of more than one number from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if "copy" in func.name() and isinstance(out, OnCuda):
            sources = [x for x in args if isinstance(x, Tensor) and not isinstance(x, OnCuda)]
            assert not [x for x in sources if x.dim()], f"{func} copies from the host"
        return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt_neox"])
def test_a_step_needs_no_host(family: str, waited: list[str]) -> None:
    def capture(call: Callable[[], Tensor], rewind: Callable[[], None]) -> Callable[[], Tensor]:
        rewind()
        waited.clear()
        with NothingCrosses():
            call()
        assert not waited, f"the host waits in {waited}"
        rewind()
        return call

    here, there = tiny_model(family).eval(), tiny_model(family).eval().to("cuda")
    steps = CapturedGeneration(there, 8, capture)
    steps.prefill(torch.tensor([3, 1, 4]))
    found = steps.step(1)
    expected = here(torch.tensor([[3, 1, 4, 1]])).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
