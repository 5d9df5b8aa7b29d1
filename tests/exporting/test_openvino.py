"""OpenVINO: the files that openvino-genai loads, run by it where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import PROMPTS, byte_level, save

import secateur
from secateur.errors import ExportError

INSTALLED = find_spec("openvino_genai") is not None
runs = pytest.mark.skipif(not INSTALLED, reason="openvino-genai is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


@torch.no_grad()
def expected(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(ids) :].tolist())


@runs
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
        assert list(got) == expected(model, ids, 8)


def test_models_that_it_does_not_read_are_refused(tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "gemma2")
    with pytest.raises(ExportError, match="not 'gemma2'"):
        secateur.export(source, output=tmp_path / "out", to="openvino")
