"""Mixes of llama.cpp's quantizer: their types, and the zeros that they lose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_models import byte_level, save, texts

import secateur
from secateur.errors import RecipeError


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256-wide rows in most matrices; 320-wide ones in `down_proj`."""
    folder = tmp_path_factory.mktemp("model")
    source = save(
        folder / "dense", byte_level(), "llama", hidden_size=256, intermediate_size=320,
        num_hidden_layers=1, head_dim=64, attention_bias=False,
    )  # fmt: skip
    output = folder / "pruned"
    secateur.prune(source, output=output, method="magnitude", sparsity=0.5)
    return output


@pytest.mark.parametrize(("type", "keeps"), [("q6_k", True), ("q4_k_m", False)])
def test_a_mix_is_made_and_its_zeros_are_counted(
    type: str, keeps: bool, pruned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = secateur.export(pruned, output=tmp_path / "out", type=type)
    made = found.exported
    assert "llama_model" not in "".join(capfd.readouterr())  # llama.cpp's own log
    (name,) = found.files  # the float32 file is gone
    file = tmp_path / "out" / name
    stored = {x.name: x.tensor_type.name for x in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.ffn_up.weight"] == {"q6_k": "Q6_K", "q4_k_m": "Q4_K"}[type]
    assert made.file_bytes == file.stat().st_size
    assert made.zeros == pytest.approx(made.weights / 2, rel=0.01)
    lost = made.zeros - made.zeros_kept
    assert (lost == 0) if keeps else (lost > made.zeros / 2)
    assert [f"{lost:,}" in note for note in made.notes[:1]] == [] if keeps else [True]
    assert any(text for _, text in texts(file))


def test_without_the_package_the_error_names_it(
    pruned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    with pytest.raises(RecipeError, match=r"\[llamacpp\]"):
        secateur.export(pruned, output=tmp_path / "out", type="q6_k")
    assert not (tmp_path / "out").exists()
