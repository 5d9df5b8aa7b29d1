"""ONNX and OpenVINO: models run by their engines where these are installed, and stored blocks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf_models import PROMPTS, byte_level, expected, save

import secateur
from secateur.errors import ArchitectureError, ExportError, RecipeError
from secateur.exporting import onnx
from secateur.exporting.onnx import unpacked
from secateur.structured.cut import Cut
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint

INSTALLED = all(find_spec(package) for package in onnx.PACKAGES)
runs = pytest.mark.skipif(not INSTALLED, reason="onnxruntime-genai is not installed")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "attention_bias": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


def continued(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by ONNX Runtime."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))[len(prompt) :]


@runs
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_onnx_runtime_continues_like_transformers(family, tokenizer, tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if family != "qwen2" or k != "head_dim"}
    source = save(tmp_path / "model", tokenizer, family, **sizes)
    secateur.export(source, output=tmp_path / "out", to="onnx", type="fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for prompt, (ids, text) in zip(PROMPTS, expected(model, tokenizer), strict=True):
        got = tokenizer.decode([*ids, *continued(tmp_path / "out", ids, 8)])
        assert got.startswith(tokenizer.decode(tokenizer(prompt)["input_ids"]))
        assert text.rstrip("\ufffd") in got


@runs
@pytest.mark.parametrize("type", ["fp32", "int8", "int4"])
def test_every_type_keeps_all_zeros(type, tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "llama", **SIZES)
    secateur.prune(source, output=tmp_path / "pruned", method="magnitude", sparsity=0.5)
    packed = secateur.compress(tmp_path / "pruned", output=tmp_path / "packed", values="keep")
    made = secateur.export(packed.output, output=tmp_path / "out", to="onnx", type=type).exported
    assert made.zeros == pytest.approx(made.weights / 2, rel=0.01)
    assert made.zeros_kept == made.zeros
    assert made.types == {{"fp32": "float32"}.get(type, type): 3 * 5}


def test_blocks_by_hand() -> None:
    codes = np.zeros((1, 1, 16), dtype=np.uint8) + (8 | 8 << 4)
    codes[0, 0, 0] = 11 | 6 << 4
    scales = np.array([[0.5]], dtype=np.float32)
    row = unpacked(codes, scales, bits=4, columns=20)
    assert row.shape == (1, 20)
    assert row[0, :3].tolist() == [1.5, -1.0, 0.0]
    wide = unpacked(np.array([[[129, 128]]], dtype=np.uint8), scales, bits=8, columns=2)
    assert wide.tolist() == [[0.5, 0.0]]


def test_without_the_package_the_error_names_it(tokenizer, tmp_path: Path, monkeypatch) -> None:
    source = save(tmp_path / "model", tokenizer, "llama")
    monkeypatch.setattr(onnx, "PACKAGES", ("no_such_package",))
    with pytest.raises(RecipeError, match=r"pip install '.\[onnx\]'"):
        secateur.export(source, output=tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_layers_of_different_sizes_are_refused(tokenizer, tmp_path: Path, monkeypatch) -> None:
    source = save(tmp_path / "model", tokenizer, "llama", attention_bias=False)
    with pytest.warns(VariedSizesWarning):
        cut_checkpoint(source, Cut(neurons={0: (1, 2, 3, 4)}), tmp_path / "cut")
    monkeypatch.setattr(onnx, "PACKAGES", ())
    with pytest.raises(ArchitectureError, match="layers"):
        secateur.export(tmp_path / "cut", output=tmp_path / "out", to="onnx")


# --- OpenVINO: the files that openvino-genai loads

runs_openvino = pytest.mark.skipif(
    find_spec("openvino_genai") is None, reason="openvino-genai is not installed"
)


@torch.no_grad()
def tokens_after(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


@runs_openvino
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_openvino_continues_like_transformers(family, tokenizer, tmp_path: Path) -> None:
    import openvino
    import openvino_genai

    source = save(
        tmp_path / "model", tokenizer, family, hidden_size=64, intermediate_size=96,
        attention_bias=False, tie_word_embeddings=False, dtype=torch.float16,
        **({} if family == "qwen2" else {"head_dim": 16}),
    )  # fmt: skip
    found = secateur.export(source, output=tmp_path / "out", to="openvino", type="f16")
    file = tmp_path / "out" / found.files[0]
    pipeline = openvino_genai.LLMPipeline(
        str(file), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32"
    )
    how = openvino_genai.GenerationConfig()
    how.max_new_tokens, how.ignore_eos, how.do_sample = 8, True, False
    model = secateur.load(source, dtype=torch.float16).float()
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        got = pipeline.generate(openvino.Tensor(np.array([ids], dtype=np.int64)), how).tokens[0]
        assert list(got) == tokens_after(model, ids, 8)


def test_models_that_openvino_does_not_read_are_refused(tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "gemma2")
    with pytest.raises(ExportError, match="not 'gemma2'"):
        secateur.export(source, output=tmp_path / "out", to="openvino")
