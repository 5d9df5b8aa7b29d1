"""The plan of a run and the memory of the GPU that it takes: enough, and not much more."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pretended import forget_peak, memory
from tiny import tiny_tokenizer
from zoo import SIZES

import secateur
from secateur.calibration.windows import save_windows

SHAPES = {
    "wide": ({"hidden_size": 128, "intermediate_size": 352}, (4, 32)),
    "long": ({"hidden_size": 64, "intermediate_size": 96}, (8, 128)),
}
"""Sizes of a model, and its windows: mostly weights, and mostly hidden states."""
MOST = 1.6  # there is room for a factorisation that fails and is done in another way


@pytest.mark.parametrize("how", [{"method": "wanda"}, {"method": "sparsegpt"}, {"method": "alps"}])
@pytest.mark.parametrize("shape", SHAPES)
def test_prune(shape: str, how: dict[str, Any], tmp_path: Path) -> None:
    sizes, windows = SHAPES[shape]
    own = {**SIZES, **sizes, "num_hidden_layers": 2, "max_position_embeddings": windows[1]}
    config = transformers.LlamaConfig(**own)
    with torch.utils._python_dispatch._disable_current_modes():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
        tiny_tokenizer().save_pretrained(tmp_path / "source")
        ids = torch.randint(3, SIZES["vocab_size"], windows)
        save_windows(ids, tmp_path / "windows.safetensors")
    options = {
        "calibration": tmp_path / "windows.safetensors", "micro_batch_tokens": windows[1],
        "sparsity": 0.5, "activations": "gpu", "device": "cuda", **how,
    }  # fmt: skip
    planned = secateur.prune(tmp_path / "source", dry_run=True, **options).to_json()
    gc.collect()  # what earlier tests left would be freed in the run
    before = memory[0].live
    forget_peak()
    secateur.prune(tmp_path / "source", output=tmp_path / "out", **options)
    taken = memory[0].peak - before
    assert taken <= planned["peak_bytes"] <= MOST * taken
