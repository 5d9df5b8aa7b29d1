"""A draft head as a GGUF file: llama.cpp gives the logits of our own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import byte_level, predicted, save

import secateur
from secateur.errors import RecipeError
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.draft_head import DraftHead, head_config, read_head, write_head

TOKENS = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, a random head of it, and both as files."""
    place, tokenizer = tmp_path_factory.mktemp("heads"), byte_level()
    save(place / "parent", tokenizer, "llama")
    parent: Any = secateur.load(place / "parent")
    torch.manual_seed(1)
    head = DraftHead(head_config(parent.config), (0, 1, 2), torch.arange(3, len(tokenizer), 7))
    for name, parameter in head.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    (place / "head").mkdir()
    write_head(place / "head", head, "parent", "LlamaForCausalLM", 4)
    tokenizer.save_pretrained(place / "head")
    for name in ("parent", "head"):
        secateur.export(place / name, output=place / f"{name}-gguf", to="gguf", type="f32")
    return place


def file_of(place: Path, name: str) -> Path:
    [file] = (place / f"{name}-gguf").glob("*.gguf")
    return file


def test_the_file_says_what_llama_cpp_asks(place: Path) -> None:
    file = gguf.GGUFReader(file_of(place, "head"))
    head = read_head(place / "head")
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["general.architecture"] == "eagle3"
    assert fields["eagle3.target_layers"] == [0, 1, 2]
    assert fields["eagle3.target_hidden_size"] == head.config.hidden_size
    assert fields["eagle3.block_count"] == 1
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert tensors["d2t"].data.tolist() == head.ids.tolist()
    assert tensors["output.weight"].shape.tolist() == [head.config.hidden_size, len(head.ids)]
    assert "token_embd.weight" not in tensors


def test_its_logits_are_ours(place: Path) -> None:
    """One call with tokens and h; the embeddings are those of the parent's context."""
    head, parent = read_head(place / "head").float(), secateur.load(place / "parent")
    torch.manual_seed(2)
    states = torch.randn(1, TOKENS, 3 * head.config.hidden_size)
    ids = torch.randint(head.config.vocab_size, (TOKENS,))
    with torch.no_grad():
        embedded = parent.get_input_embeddings()(ids)[None].float()
        [expected], hidden = head(states, embedded), head.fc(states)[0].contiguous()
    got = predicted(file_of(place, "head"), hidden, ids.tolist(), file_of(place, "parent"))
    torch.testing.assert_close(got[:, head.ids], expected[0], rtol=2e-2, atol=2e-2)
    out = torch.ones(head.config.vocab_size, dtype=torch.bool)
    out[head.ids] = False
    assert bool((got[:, out] == -torch.inf).all())


@pytest.mark.parametrize(("to", "type"), [("onnx", None), ("gguf", "q4_k_m")])
def test_other_forms_are_refused(place: Path, tmp_path: Path, to: str, type: str | None) -> None:
    with pytest.raises(RecipeError) as error:
        secateur.export(place / "head", output=tmp_path / "x", to=to, type=type)
    assert str(place / "head") in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("type", ["q8_0", "bf16", "q4_0"])
def test_types(place: Path, tmp_path: Path, type: str) -> None:
    secateur.export(place / "head", output=tmp_path / "x", to="gguf", type=type)
    [file] = (tmp_path / "x").glob("*.gguf")
    kinds = {x.name: x.tensor_type.name for x in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == type.upper()
    assert (kinds["d2t"], kinds["output_norm.weight"]) == ("I64", "F32")
    with LlamaCpp(file) as model:
        assert model.vocabulary_size == read_head(place / "head").config.vocab_size
