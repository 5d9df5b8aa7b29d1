"""GGUF files, read back by the package gguf and run by llama.cpp."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_models import PROMPTS, WORDS, assert_alike, byte_level, fields, save, texts
from tiny import save_tiny
from zoo import FOR_LLAMA_CPP, SIZES, class_of

import secateur
from secateur.errors import ExportError, RecipeError
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.exporting.gguf.tokenizer import split_rules
from secateur.exporting.gguf.writing import dequantized, stored_blocks
from secateur.quantization.groups import GroupGrid
from secateur.structured.cut import Cut
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint

Q4_0 = gguf.GGMLQuantizationType.Q4_0


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def pruned(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with half of its weights zero."""
    place = tmp_path_factory.mktemp("pruned")
    source = save(place / "model", tokenizer, "llama", intermediate_size=64)
    secateur.prune(source, output=place / "pruned", method="magnitude", sparsity=0.5)
    return place / "pruned"


def test_a_draft_has_the_tokens_of_its_parent(pruned: Path, tokenizer, tmp_path: Path) -> None:
    """Engines compare the tokenizers of both files, and the rows of their embeddings."""
    parent = pruned.parent / "model"
    found = secateur.export(pruned, output=tmp_path / "out", type="q4_0", draft_of=parent)
    assert any("draft model" in note for note in found.exported.notes)
    theirs = secateur.export(parent, output=tmp_path / "parent", type="f32")
    draft, dense = (gguf.GGUFReader(x.output / x.files[0]) for x in (found, theirs))
    words = [name for name in dense.fields if name.startswith("tokenizer.")]
    assert "tokenizer.ggml.tokens" in words
    assert words == [name for name in draft.fields if name.startswith("tokenizer.")]
    assert all(draft.fields[n].contents() == dense.fields[n].contents() for n in words)
    rows = [{t.name: t.shape[1] for t in one.tensors if t.name == "token_embd.weight"}
            for one in (draft, dense)]  # fmt: skip
    assert rows[0] == rows[1] == {"token_embd.weight": len(tokenizer)}
    more = save(tmp_path / "more", tokenizer, "llama", intermediate_size=64, vocab_size=328)
    with pytest.raises(RecipeError, match="328 rows"):
        secateur.export(pruned, output=tmp_path / "other", draft_of=more)
    words = save_tiny(tmp_path / "words")
    for to in ("gguf", "compressed-tensors"):
        with pytest.raises(RecipeError, match="vocabularies"):
            secateur.export(pruned, output=tmp_path / "other", to=to, draft_of=words)
    assert not (tmp_path / "other").exists()


def test_layers_of_different_sizes_run_too(tokenizer, tmp_path: Path) -> None:
    """The architecture `deci` has a size for each layer."""
    source = save(tmp_path / "model", tokenizer, "llama", attention_bias=False)
    cut = Cut(groups={0: (1,)}, neurons={0: (), 2: tuple(range(32))})
    with pytest.warns(VariedSizesWarning):
        cut_checkpoint(source, cut, tmp_path / "cut")
    found = secateur.export(tmp_path / "cut", output=tmp_path / "out", type="f32")
    (name,) = found.files
    reader = gguf.GGUFReader(str(tmp_path / "out" / name))
    assert reader.fields["general.architecture"].contents() == "deci"
    assert_alike(tmp_path / "out" / name, secateur.load(tmp_path / "cut"), tokenizer)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"])
def test_every_type_keeps_all_zeros(type, pruned: Path, tmp_path: Path) -> None:
    found = secateur.export(pruned, output=tmp_path / "out", type=type).exported
    assert found.zeros == pytest.approx(found.weights / 2, rel=0.01)
    assert found.zeros_kept == found.zeros
    assert not found.notes


def test_an_int4_model_becomes_q4_0_without_any_change(pruned: Path, tmp_path: Path) -> None:
    packed = secateur.compress(
        pruned, output=tmp_path / "packed", values="int4", embeddings="int4", group_size=32
    )
    found = secateur.export(packed.output, output=tmp_path / "out", type="q4_0")
    (name,) = found.files
    dense = secateur.load(packed.output, expand=True, dtype=torch.float32).state_dict()
    tensors = {x.name: x for x in gguf.GGUFReader(str(tmp_path / "out" / name)).tensors}
    names = {"token_embd": "model.embed_tokens"}
    for layer in range(SIZES["num_hidden_layers"]):
        for theirs, ours in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    for theirs, ours in names.items():
        tensor = tensors[f"{theirs}.weight"]
        assert tensor.tensor_type == Q4_0
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, dense[f"{ours}.weight"].numpy())


def test_every_matrix_has_the_type_nearest_to_how_it_is_stored(tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "llama", intermediate_size=64)
    packed = secateur.compress(
        source, output=tmp_path / "packed", values="bfloat16", embeddings="int4", group_size=None,
        overrides={"model.layers.*.mlp.*": "int4", "model.layers.*.self_attn.v_proj": "int8"},
    )  # fmt: skip
    found = secateur.export(packed.output, output=tmp_path / "out", type="stored")
    (name,) = found.files
    dense = secateur.load(packed.output, expand=True, dtype=torch.float32)
    tensors = {x.name: x for x in gguf.GGUFReader(str(tmp_path / "out" / name)).tensors}
    types = gguf.GGMLQuantizationType
    for theirs, ours, type, error in (
        ("ffn_up", "mlp.up_proj", types.Q4_0, 0.0),
        ("attn_output", "self_attn.o_proj", types.BF16, 0.0),
        ("attn_v", "self_attn.v_proj", types.Q8_0, 0.01),
    ):
        tensor = tensors[f"blk.0.{theirs}.weight"]
        assert tensor.tensor_type == type
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        expected = dense.state_dict()[f"model.layers.0.{ours}.weight"]
        assert float((values - expected).norm() / expected.norm()) <= error
    assert tensors["token_embd.weight"].tensor_type == types.Q4_0
    assert tensors["output_norm.weight"].tensor_type == types.F32
    assert_alike(tmp_path / "out" / name, dense, tokenizer)


def test_blocks_on_no_grid_are_rounded_by_gguf_and_the_others_are_exact() -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    grid = GroupGrid(4, 32)
    weight[:, 32:64] = grid.dequantize(*grid.quantize(weight[:, 32:64]))
    weight[3, 64:] = 0
    found = dequantized(stored_blocks(weight, Q4_0), Q4_0)
    theirs = dequantized(gguf.quants.quantize(weight.numpy(), Q4_0), Q4_0)
    assert torch.equal(found[:, 32:64], weight[:, 32:64])
    assert not torch.equal(theirs[:, 32:64], weight[:, 32:64])
    assert torch.equal(found[:, :32], theirs[:, :32])
    assert torch.equal(found[:, 64:], theirs[:, 64:])


@pytest.mark.parametrize("power", [-20, -15, 0, 12, 15])
def test_scales_of_q4_0_down_to_the_small_ones_of_float16(power: int) -> None:
    mantissas = 1 + torch.arange(16) / 16  # all five bits
    codes = torch.tensor([7.0, -7, 1, 0, 3, -5, 6, -2]).repeat(4)
    weight = torch.ldexp(mantissas[:, None] * codes, torch.tensor(power))
    assert torch.equal(dequantized(stored_blocks(weight, Q4_0), Q4_0), weight)


@pytest.mark.parametrize("power", [-22, 16])
def test_a_scale_that_float16_lacks_spoils_only_its_block(power: int) -> None:
    weight = torch.tensor([7.0, -7, 1, 0, 3, -5, 6, -2]).repeat(2, 8)
    weight[0, :32] *= 2.0**power * (1 + 1 / 16)
    found = dequantized(stored_blocks(weight, Q4_0), Q4_0)
    assert not torch.equal(found[0, :32], weight[0, :32])
    assert torch.equal(found[0, 32:], weight[0, 32:])
    assert torch.equal(found[1], weight[1])


def test_odd_rows_are_float16_and_the_note_says_so(tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "llama", intermediate_size=40)
    found = secateur.export(source, output=tmp_path / "out").exported
    assert found.types["F16"] == SIZES["num_hidden_layers"]
    assert "3 matrices" in found.notes[0]


LEVEL = {"type": "ByteLevel", "use_regex": True}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalises by Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "rules for splitting"),
        ({"pre_tokenizer": {**LEVEL, "use_regex": False}}, "rules for splitting"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], said: str) -> None:
    known = {"pre_tokenizer": LEVEL}
    assert split_rules(known, "t") == "gpt-2"
    with pytest.raises(ExportError, match=said):
        split_rules({**known, **changes}, "t")


def test_unknown_targets_and_types_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gguf"):
        secateur.export("x", output=tmp_path / "o", to="ggfu")
    with pytest.raises(RecipeError, match="iq9"):
        secateur.export("x", output=tmp_path / "o", type="iq9")


LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
STRETCHED = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 256, "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {
    "rope_parameters": STRETCHED, "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
}  # fmt: skip

SEEING = ("gemma3 vision", "gemma4 vision", "llava", "mistral3", "smolvlm")
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with Llama 3 positions": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": (transformers.GemmaConfig(**SIZES, head_dim=8), {}),
    "gemma2": ("gemma2", {}),
    "gemma2, cut by one layer": ("gemma2", {"num_hidden_layers": 2, "layer_types": LOCAL[:2]}),
    "gemma3": ("gemma3", {}),
    "gemma3 with a soft cap": ("gemma3", {"final_logit_softcapping": 5.0}),
    "phi3": ("phi3", {}),
    "phi3 with LongRoPE": ("phi3", LONG),
    "phi3, half rotated": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    }}),
    "granite": (transformers.GraniteConfig(
        **SIZES, attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.7,
        logits_scaling=1.5,
    ), {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe, tied": ("qwen2_moe", {"mlp_only_layers": [], "tie_word_embeddings": True}),
    **{name: (name, changes) for name, changes in FOR_LLAMA_CPP.items()},
    **{name: (name, {"head_dim": 32}) for name in ("glm4_moe", "gemma4", "gemma4_text")},
    "gemma4_text small": ("gemma4_text small", {"vocab_size_per_layer_input": WORDS}),
    **{name: (name, {}) for name in SEEING},
}  # fmt: skip


STORED = {
    "phi3 with LongRoPE": {"phi3.context_length": 256},  # it ends where the factors change
    "gemma3": {  # its window limits nothing
        "gemma3.context_length": SIZES["max_position_embeddings"],
        "gemma3.attention.sliding_window": 8, "gemma3.attention.sliding_window_pattern": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_continues_like_transformers(name, tokenizer, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    source = save(tmp_path / "model", tokenizer, deepcopy(family), **changes)
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    file = tmp_path / "out" / found.files[0]
    kind = class_of(transformers.AutoConfig.from_pretrained(source))
    assert_alike(file, kind.from_pretrained(source, dtype=torch.float32), tokenizer)
    stored, expected = fields(file), STORED.get(name, {})
    assert {field: stored[field] for field in expected} == expected
    assert any("256" in x for x in found.exported.notes) == (name == "phi3 with LongRoPE")
    sees = name in (*SEEING, "qwen3_5 vision")
    assert any("see or hear" in x for x in found.exported.notes) == sees


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_compressed_mixtures_too(family, tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, family, **FOR_LLAMA_CPP.get(family, {}))
    secateur.prune(source, output=tmp_path / "pruned", method="magnitude", sparsity=0.5)
    secateur.compress(tmp_path / "pruned", output=tmp_path / "packed", values="keep")
    made = secateur.export(tmp_path / "packed", output=tmp_path / "out", type="f32").exported
    assert made.zeros_kept == made.zeros > 0.45 * made.weights
    (file,) = (tmp_path / "out").iterdir()
    assert_alike(file, secateur.load(tmp_path / "packed", expand=True), tokenizer, PROMPTS[:2])


@pytest.mark.parametrize("size", [8, 32])
def test_blocks_across_heads_that_change_places(size: int, tokenizer, tmp_path: Path) -> None:
    """Heads of 8 channels share blocks of 32, so llama.cpp's order needs other blocks."""
    sizes = {"linear_key_head_dim": size, "linear_value_head_dim": size, "head_dim": 32}
    source = save(tmp_path / "model", tokenizer, "qwen3_5_text", **sizes)
    packed = secateur.compress(source, output=tmp_path / "packed", values="q4_0").output
    secateur.export(packed, output=tmp_path / "out", type="q4_0")
    (file,) = (tmp_path / "out").iterdir()
    model, prompt = secateur.load(packed, expand=True), "a b"
    expected = model(tokenizer(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
    with LlamaCpp(file) as engine:
        (found,) = engine.run(tokenizer(prompt, return_tensors="pt")["input_ids"], logits=True)
    error = (found[-1] - expected).norm() / expected.norm()
    assert error < 0.05  # llama.cpp rounds what multiplies a row


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 9}, "by the root of 9, llama.cpp by that of 8"),
        ("gemma3", {"query_pre_attn_scalar": 9}, "by the root of 9, llama.cpp by that of 8"),
        ("gemma2", {"attn_logit_softcapping": None}, "has no soft caps"),
        ("gemma2", {"hidden_activation": "silu"}, "the activation is silu"),
        ("gemma3", {"layer_types": [LOCAL[1], LOCAL[0], LOCAL[1]]}, "follow no period"),
        ("gemma3", {"use_bidirectional_attention": True}, "see those behind them"),
        ("gemma2", {"tie_word_embeddings": False}, "its head is not its embedding"),
        ("qwen2_moe", {}, r"its layers have \[0, 5\] experts"),
        ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": True}, "by their sum"),
        ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}, "does not divide"),
        ("llama", {"rope_parameters": {**STRETCHED, "factor": 2.0}}, "'longrope'"),
        ("llama", {"rope_parameters": DYNAMIC}, "'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("gemma4_text shared", {"vocab_size_per_layer_input": WORDS}, "share the keys"),
        ("gemma4_text small", {}, "table of 96 tokens"),
        ("qwen3_5_text", {}, "its heads have 8 channels"),
        ("gpt_neox", {}, "'gpt_neox'"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    family, changes, said, tokenizer, tmp_path: Path
) -> None:
    source = save(tmp_path / "model", tokenizer, family, **changes)
    with pytest.raises(ExportError, match=said):
        secateur.export(source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
    ],
)
def test_the_refusal_names_a_target_that_takes_the_model(
    family, changes, tokenizer, tmp_path: Path
) -> None:
    source = save(tmp_path / "model", tokenizer, family, **changes)
    with pytest.raises(ExportError, match=r"to='compressed-tensors'") as refusal:
        secateur.export(source, output=tmp_path / "out")
    assert "serve" in str(refusal.value)
    secateur.export(source, output=tmp_path / "out", to="compressed-tensors", type="w8a8")
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- mixes of llama.cpp's quantizer: their types, and the zeros that they lose


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    type: str, keeps: bool, wide: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = secateur.export(wide, output=tmp_path / "out", type=type)
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
    wide: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    with pytest.raises(RecipeError, match=r"\[llamacpp\]"):
        secateur.export(wide, output=tmp_path / "out", type="q6_k")
    assert not (tmp_path / "out").exists()
