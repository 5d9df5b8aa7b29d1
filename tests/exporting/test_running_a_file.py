"""Runs of GGUF files by llama.cpp: logits beside transformers', nodes, tokens, types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from benchmarks.gguf_files.importance import chosen
from gguf_models import byte_level, save
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import CheckpointError
from secateur.exporting.gguf import llama_cpp
from secateur.exporting.gguf.llama_cpp import LlamaCpp, Node, quantize

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and its float32 file."""
    place = tmp_path_factory.mktemp("mixture")
    source = save(place / "model", byte_level(), "qwen3_moe", decoder_sparse_step=1)
    secateur.export(source, output=place / "out", type="f32")
    (file,) = (place / "out").iterdir()
    return source, file


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(5, 300, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("at_once", [512, 16])
def test_logits_are_those_of_transformers(
    at_once: int, mixture: Any, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "AT_ONCE", at_once)
    source, file = mixture
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=windows).logits
    with LlamaCpp(file) as engine:
        found = torch.stack([*engine.run(windows, logits=True)])  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nodes_are_shown_for_every_token_and_the_head_only_if_wanted(
    mixture: Any, windows: torch.Tensor
) -> None:
    seen: list[Node] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def see(node: Node) -> None:
        seen.append(node)
        shapes[node.name] = tuple(node.value().shape)

    with LlamaCpp(mixture[1]) as engine:

        def wanted(node: Node) -> bool:
            return node.name.startswith("ffn_moe_topk") or node.name == "result_output"

        assert [*engine.run(windows[:1], wanted, see)] == [None]
        assert shapes == {f"ffn_moe_topk-{layer}": (1, 1, 40, 2) for layer in range(3)}
        [_] = engine.run(windows[:1], wanted, see, logits=True)
    assert shapes["result_output"] == (1, 1, 40, 320)


def test_what_a_caller_raises_comes_back(mixture: Any, windows: torch.Tensor) -> None:
    def see(node: Node) -> None:
        raise KeyboardInterrupt(node.name)

    with LlamaCpp(mixture[1]) as engine:
        with pytest.raises(KeyboardInterrupt, match="result_norm"):
            [*engine.run(windows, lambda node: node.name == "result_norm", see, logits=True)]
        assert len([*engine.run(windows)]) == 3  # the engine is still whole


def test_tokens_are_those_of_the_tokenizer(mixture: Any) -> None:
    tokenizer, texts = byte_level(), ["def add(a, b):\n", "naïve <|endoftext|> café"]
    with LlamaCpp(mixture[1]) as engine:
        for special in (True, False):
            theirs = engine(texts, add_special_tokens=special)["input_ids"]
            assert theirs == tokenizer(texts, add_special_tokens=special)["input_ids"]
        assert engine.eos_token_id == tokenizer.eos_token_id
        assert engine.vocabulary_size == len(tokenizer)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError) as refusal:
        LlamaCpp(tmp_path / "x.gguf")
    assert refusal.value.where == str(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", sorted(gguf.quants._type_traits))
def test_types_are_decoded_as_gguf_does(kind: gguf.GGMLQuantizationType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = torch.randint(0, 60, (2, 256 // block * size)).to(torch.uint8).numpy()
    found = llama_cpp.decoded(rows, kind)
    torch.testing.assert_close(found, torch.from_numpy(gguf.quants.dequantize(rows, kind)))


def test_the_quantizer_takes_types_and_an_importance_matrix(tmp_path: Path) -> None:
    source = save(
        tmp_path / "model", byte_level(), "llama", hidden_size=256, intermediate_size=256,
        num_hidden_layers=1, head_dim=64,
    )  # fmt: skip
    secateur.export(source, output=tmp_path / "out", type="f32")
    (exact,) = (tmp_path / "out").iterdir()
    names = [t.name for t in gguf.GGUFReader(exact).tensors if len(t.shape) > 1]
    importance = {name: torch.rand(256).add(0.1).numpy() for name in names}
    types = {r"ffn_down\.weight": Q.Q6_K, "attn_q": Q.IQ3_S}
    quantize(
        exact, tmp_path / "a.gguf", gguf.LlamaFileType.MOSTLY_IQ2_XXS, **chosen(importance, types)
    )
    found = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert found["blk.0.ffn_down.weight"] == Q.Q6_K
    assert found["blk.0.attn_q.weight"] == Q.IQ3_S
    assert found["blk.0.ffn_up.weight"] == Q.IQ2_XXS
