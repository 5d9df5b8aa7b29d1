"""On a GPU: the same masks as on the CPU."""

from __future__ import annotations

import pytest
import torch
from zoo import matrices, tiny_model, tiny_windows

import secateur


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_cuda_prunes_as_the_cpu_does(method: str) -> None:
    options = {"method": method, "sparsity": 0.5, "calibration": tiny_windows()}
    on_cpu, on_gpu = tiny_model("llama"), tiny_model("llama").cuda()
    secateur.prune(on_cpu, **options)
    secateur.prune(on_gpu, **options)
    for name, module in matrices(on_cpu).items():
        same = (module.weight == 0) == (matrices(on_gpu)[name].weight == 0).cpu()
        assert same.float().mean() > 0.99, name
