"""K types by llama.cpp's quantizer: which keep zeros, and what is said of the others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_models import byte_level, save, texts

import secateur
from secateur.errors import RecipeError

KEEPING = ("q6_k", "q3_k")


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


def kinds(file: Path) -> dict[str, str]:
    return {x.name: x.tensor_type.name for x in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("type", KEEPING)
def test_some_types_keep_all_zeros(type: str, pruned: Path, tmp_path: Path) -> None:
    found = secateur.export(pruned, output=tmp_path / "out", type=type, keep_zeros=True)
    made = found.exported
    assert made.zeros == pytest.approx(made.weights / 2, rel=0.01)
    assert made.zeros_kept == made.zeros
    (file,) = found.files  # the float32 file is gone
    stored = kinds(tmp_path / "out" / file)
    assert stored["blk.0.ffn_up.weight"] == type.upper()
    assert stored["blk.0.ffn_down.weight"] == {"q6_k": "Q8_0", "q3_k": "Q4_0"}[type]
    assert "no multiple of 256" in made.notes[0]
    assert made.file_bytes == (tmp_path / "out" / file).stat().st_size
    assert any(text for _, text in texts(tmp_path / "out" / file))


def test_other_types_say_how_many_they_lost(
    pruned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = secateur.export(pruned, output=tmp_path / "out", type="q4_k_m").exported
    lost = found.zeros - found.zeros_kept
    assert lost > found.zeros / 2
    assert found.notes[0] == f"{lost:,} of {found.zeros:,} zeros were lost in gguf q4_k_m"
    assert "llama_model" not in "".join(capfd.readouterr())  # llama.cpp's own log


@pytest.mark.parametrize("type", ["q5_k_m", "q4_k_m", "q3_k_m", "q2_k"])
def test_keep_zeros_refuses_them_before_anything_is_read(type: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not keep exact zeros") as refused:
        secateur.export("x", output=tmp_path / "out", type=type, keep_zeros=True)
    assert "q8_0" in str(refused.value)
    assert "q4_k_m" not in str(refused.value.remedy)


def test_without_the_package_the_error_names_it(
    pruned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    with pytest.raises(RecipeError, match=r"pip install '.\[llamacpp\]'"):
        secateur.export(pruned, output=tmp_path / "out", type="q6_k")
    assert not (tmp_path / "out").exists()
