"""A fit for llama.cpp: formats that a GGUF file holds, bytes of the file, and the file itself."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf_models import byte_level, save
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError
from secateur.runtime.formats import WeightFormat
from secateur.runtime.install import open_checkpoint
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting.problem import GGUF_FILE

Q = gguf.GGMLQuantizationType
TYPE_OF = {"bfloat16": Q.BF16, "int8": Q.Q8_0, "int4": Q.Q4_0}
THEIR_NAMES = {
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def bytes_with(place: Path, values: str, embeddings: str) -> int:
    """The bytes of a file whose linears all have one type."""
    model = PackableCheckpoint.open(place / "dense")
    total = GGUF_FILE.rest(model)
    for name, matrix in model.matrices.items():
        rows, columns = model.reader.entries[name].shape
        own = values if matrix.prunable else embeddings
        total += GGUF_FILE.matrix(name, (rows, columns), WeightFormat(own, 0.0))
    return total


def test_a_fit_for_llama_cpp_writes_the_file_that_it_counted(tmp_path: Path) -> None:
    save(tmp_path / "dense", byte_level(), "llama", intermediate_size=64)
    save_windows(tiny_windows(12, 24), tmp_path / "windows.safetensors")
    most = (bytes_with(tmp_path, "int8", "int8") + bytes_with(tmp_path, "int4", "int4")) // 2
    options = {
        "target": "llama.cpp", "effort": "fast", "calibration": tmp_path / "windows.safetensors",
    }  # fmt: skip
    found = secateur.fit(
        tmp_path / "dense", output=tmp_path / "small", max_size=str(most), **options
    )
    (file,) = (tmp_path / "small").glob("*.gguf")
    assert found.winner.file_bytes == file.stat().st_size == found.checks[0].measured <= most
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    packed = open_checkpoint(tmp_path / "small")
    for layer in range(2):
        for ours, theirs in THEIR_NAMES.items():
            name = f"model.layers.{layer}.{ours}"
            tensor = tensors[f"blk.{layer}.{theirs}.weight"]
            assert tensor.tensor_type == TYPE_OF[found.kind_of[name]]
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            weight = packed.read(f"{name}.weight").float()
            error = float((values - weight).norm() / weight.norm())
            assert error <= (0.01 if found.kind_of[name] == "int8" else 0.005), name
    assert tensors["token_embd.weight"].tensor_type == TYPE_OF[found.embeddings]
    least = bytes_with(tmp_path, "int4", "int4")
    with pytest.raises(RecipeError, match="fits") as caught:
        secateur.fit(tmp_path / "dense", output=tmp_path / "no", max_size=str(least - 9), **options)
    assert "MiB" in str(caught.value.remedy) or "KiB" in str(caught.value.remedy)


def test_zeros_are_not_offered() -> None:
    assert [stored.name for stored in GGUF_FILE.formats] == ["bfloat16", "int8", "int4"]


def test_a_model_that_llama_cpp_does_not_know_is_refused_before_work(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "gpt2")
    with pytest.raises(secateur.SecateurError):
        secateur.fit(tmp_path / "dense", output=tmp_path / "no", max_size="1MB", target="llama.cpp")
    assert not (tmp_path / "no.partial").exists()
