"""GGUF files with the layer for further tokens: llama.cpp computes the same, cut or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from further import save_further
from gguf_models import PROMPTS, WORDS, assert_alike, byte_level, fields, predicted
from transformers import AutoTokenizer

import secateur
from secateur.models.mtp import read_mtp
from secateur.models.opening import open_weights
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_checkpoint

CUTS = {
    "glm4_moe": Cut(
        layers=(1, 2), experts=dict.fromkeys((1, 2), (0, 2, 3, 5)), predicting={0: (1, 2, 3, 4)}
    ),
    "qwen3_5_moe fused": Cut(
        layers=(1, 2), experts=dict.fromkeys((1, 2), (0, 2, 4)), predicting={0: (1, 3, 4)}
    ),
}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", CUTS)
def test_layer_and_model_are_computed_alike(name: str, cut: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(("<|endoftext|>", "<|user|>", "<|observation|>"))
    words = {"vocab_size": len(tokenizer), "eos_token_id": [0, 1, 2]}
    source = save_further(tmp_path / "m", name, tokens=len(tokenizer), head_dim=32, **words)
    tokenizer.save_pretrained(source)
    if cut:
        (tmp_path / "text.txt").write_text("\n".join(PROMPTS))
        few = secateur.structure(source, output=tmp_path / "t", vocabulary=tmp_path / "text.txt")
        cut_checkpoint(few.output, CUTS[name], tmp_path / "c")
        source = tmp_path / "c"
        tokenizer = AutoTokenizer.from_pretrained(source)
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    stored = fields(file := tmp_path / "out" / found.files[0])
    arch = stored["general.architecture"]
    assert stored[f"{arch}.nextn_predict_layers"] == 1
    assert stored[f"{arch}.block_count"] == (3 if cut else 4)
    assert stored[f"{arch}.vocab_size"] == len(tokenizer) == (270 if cut else WORDS)
    assert [stored[f"tokenizer.ggml.{x}_token_id"] for x in ("eos", "eot", "eom")] == [0, 1, 2]
    parent = secateur.load(source)
    assert_alike(file, parent, tokenizer)
    torch.manual_seed(0)
    states, ids = torch.randn(1, 9, 32), torch.randint(3, len(tokenizer), (1, 9))
    mtp = read_mtp(parent, open_weights(source), torch.float32)
    [expected] = mtp(states, mtp.embed(ids))
    found_there = predicted(file, states[0], ids[0].tolist())
    torch.testing.assert_close(found_there, expected[0], rtol=1e-4, atol=1e-4)
