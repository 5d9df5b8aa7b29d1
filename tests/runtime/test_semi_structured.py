"""2:4 models as torch multiplies them: which linear layers, on which GPUs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from zoo import tiny_windows

import secateur
from secateur.errors import CheckpointError, KernelError, PatternError
from secateur.runtime import semi_structured

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def sparse_model(folder: Path, **options: Any) -> Path:
    save_tiny(folder / "dense", "llama", **{**SIZES, **options})
    secateur.prune(folder / "dense", output=folder / "pruned", method="magnitude", pattern="2:4")
    return folder / "pruned"


class Kept:
    """In the place of torch's class: the same numbers, and which matrices it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def from_dense(self, weight: Tensor) -> Tensor:
        self.given.append(weight)
        return weight.clone()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept()
    monkeypatch.setattr(semi_structured, "stored_by_torch", lambda device: found)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tiny_windows(2, 12)).logits
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_matrices_of_the_decoder_are_given_to_torch(
    dtype: torch.dtype, kept: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = sparse_model(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = secateur.load_semi_structured(source, "cpu", dtype=dtype)
    assert len(kept.given) == 3 * 4
    assert "9 of 21" in caplog.text  # k and v have 16 rows, o has 32 columns
    assert all(weight.dtype == dtype for weight in kept.given)
    assert all(bool((w.view(-1, 4).count_nonzero(1) <= 2).all()) for w in kept.given)
    assert torch.equal(logits(found), logits(secateur.load(source, dtype=dtype)))
    with pytest.raises(CheckpointError):
        found.save_pretrained(tmp_path / "again")


def test_a_matrix_with_too_many_weights_stays_dense(kept: Kept, tmp_path: Path) -> None:
    file = sparse_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][5, :3] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    secateur.load_semi_structured(file.parent, "cpu")
    assert len(kept.given) == 3 * 4 - 1
    with pytest.raises(PatternError, match="none of 21"):
        secateur.load_semi_structured(tmp_path / "dense", "cpu")


@pytest.mark.parametrize(
    ("capability", "cusparselt", "expected"),
    [
        ((7, 5), True, "no sparse tensor cores"),
        ((8, 0), False, SparseSemiStructuredTensorCUTLASS),
        ((8, 9), True, SparseSemiStructuredTensorCUSPARSELT),
        ((9, 0), True, SparseSemiStructuredTensorCUSPARSELT),
        ((9, 0), False, "cuSPARSELt"),
        ((12, 0), True, SparseSemiStructuredTensorCUSPARSELT),
    ],
    ids=str,
)
def test_each_gpu_multiplies_by_what_torch_has_for_it(
    capability: tuple[int, int], cusparselt: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    if not isinstance(expected, str):
        assert semi_structured.stored_by_torch(torch.device("cuda", 1)) is expected
        return
    with pytest.raises(KernelError, match=expected):
        semi_structured.stored_by_torch(torch.device("cuda", 1))


def test_a_processor_has_no_sparse_tensor_cores(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="cpu"):
        secateur.load_semi_structured(tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_like_the_dense_model(tmp_path: Path) -> None:
    source = sparse_model(tmp_path)
    found = secateur.load_semi_structured(source)
    dense = secateur.load(source, dtype=torch.bfloat16, device="cuda")
    ids = tiny_windows(2, 12).cuda()
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)
