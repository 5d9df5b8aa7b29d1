"""Folders that compressed-tensors wrote are imported with exactly the weights they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from library import SCHEMES, ZEROS, by_library, pruned_folder, scheme_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur


def same(found: dict[str, torch.Tensor], meant: dict[str, torch.Tensor]) -> None:
    """All tensors are equal, and there are no others."""
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", ZEROS)
def test_zeros_that_the_library_left_out(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pattern = "2:4" if "24" in format else "anywhere"
    source = pruned_folder(tmp_path / "pruned", pattern, dtype)
    folder, meant = by_library(source, tmp_path / "compressed", format)
    assert len(load_file(folder / "model.safetensors")) > len(meant)
    result = secateur.import_model(folder, output=tmp_path / "imported")
    same(load_file(tmp_path / "imported" / "model.safetensors"), meant)
    assert result.record.kind == "compressed-tensors"
    assert {x.stored_as for x in result.record.matrices} == {format}
    assert not result.rounded
    assert result.patterns == {"2:4" if "24" in format else "unstructured": 14}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "imported", dtype="auto")
    assert model.dtype == dtype
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", SCHEMES)
def test_integers_that_the_library_packed(name: str, tmp_path: Path) -> None:
    format, scheme, sparse = SCHEMES[name]
    source = pruned_folder(tmp_path / "pruned", "2:4", torch.bfloat16)
    folder, meant = by_library(source, tmp_path / "compressed", format, scheme_of(*scheme), sparse)
    result = secateur.import_model(folder, output=tmp_path / "imported")
    found = load_file(tmp_path / "imported" / "model.safetensors")
    same(found, meant)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert result.patterns == {"2:4": 14}
