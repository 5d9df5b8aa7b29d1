"""Cuts of checkpoints in a form at rest: what stays keeps its bytes, or is written dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from at_rest import (
    describe_as,
    described,
    from_float8,
    fused_in_float4,
    in_float8,
    raw,
    save_in,
    stored_tensors,
    text_file,
)
from safetensors.torch import load_file
from same_logits import assert_same_logits
from torch import Tensor

import secateur
from secateur.models.opening import open_weights
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_checkpoint

MIXTURE: dict[str, Any] = {"moe_intermediate_size": 32, "decoder_sparse_step": 1}
KEPT = {0: (0, 2, 4), 2: (1, 2, 3)}
LAYERS = (0, 2)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(raw(one), raw(other))


def test_layers_and_experts_leave_the_bytes_of_the_others(tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3_moe", shards=2, **MIXTURE)
    cut_checkpoint(folder, Cut(layers=LAYERS, experts=KEPT), tmp_path / "c")
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "c")
    checked = 0
    for name, tensor in after.items():
        old = name
        for new_layer, layer in reversed([*enumerate(LAYERS)]):
            for new, expert in enumerate(KEPT[layer]):
                start = f"model.layers.{new_layer}.mlp.experts.{new}."
                if name.startswith(start):
                    old = f"model.layers.{layer}.mlp.experts.{expert}." + name[len(start) :]
            start = f"model.layers.{new_layer}."
            if name.startswith(start) and old == name:
                old = f"model.layers.{layer}." + name[len(start) :]
        if name.endswith("mlp.gate.weight"):  # the rows of the router
            layer = int(old.split(".")[2])
            assert same_bytes(tensor, before[old][list(KEPT[layer])])
            continue
        assert same_bytes(tensor, before[old]), name
        checked += tensor.dtype == torch.float8_e4m3fn
    assert checked == 2 * (4 + 3 * 3)
    description = described(tmp_path / "c")
    assert description["quant_method"] == "fp8"
    gates = [f"model.layers.{n}.mlp.gate" for n in range(2)]
    assert description["modules_to_not_convert"] == ["lm_head", *gates]


def test_the_cut_model_is_that_of_the_dense_one(tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3_moe", **MIXTURE)
    cut_checkpoint(folder, Cut(layers=LAYERS, experts=KEPT), tmp_path / "c")
    secateur.import_model(folder, output=tmp_path / "dense")
    cut_checkpoint(tmp_path / "dense", Cut(layers=LAYERS, experts=KEPT), tmp_path / "d")
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "cd"
    )
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
    tokens = torch.arange(6)[None]
    assert_same_logits(ours(tokens).logits, theirs(tokens).logits)


def test_the_verb_keeps_the_form(tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3_moe", **MIXTURE)
    made = secateur.structure(
        folder, output=tmp_path / "s", calibration=text_file(tmp_path), windows=3,
        sequence_length=24, keep_layers=2, experts=3, effort="fast",
    )  # fmt: skip
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "s")
    stored = [raw(t) for t in before.values() if t.dtype == torch.float8_e4m3fn]
    codes = [raw(t) for t in after.values() if t.dtype == torch.float8_e4m3fn]
    assert len(codes) == 2 * (4 + 3 * 3)
    assert all(any(torch.equal(one, other) for other in stored) for one in codes)
    sizes = sum(t.nbytes for t in after.values())
    assert made.manifest.result.file_bytes == sizes
    assert made.manifest.formats == {"source": "fp8", "result": "fp8"}


@pytest.mark.parametrize("cut", [{"hidden_size": 24}, {"ffn": 32}])
def test_what_changes_a_matrix_is_written_dense(cut: dict[str, int], tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3")
    made = secateur.structure(
        folder, output=tmp_path / "s", calibration=text_file(tmp_path), windows=3,
        sequence_length=24, **cut,
    )  # fmt: skip
    assert described(tmp_path / "s") == {}
    assert made.manifest.formats == {"source": "fp8", "result": "bfloat16"}
    assert {t.dtype for t in stored_tensors(tmp_path / "s").values()} == {torch.bfloat16}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "s")


def test_a_cut_model_is_distilled_in_the_dense_dtype(tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3")
    secateur.structure(
        folder, output=tmp_path / "s", calibration=text_file(tmp_path), windows=3,
        sequence_length=24, keep_layers=2, distill_epochs=1,
    )  # fmt: skip
    assert described(tmp_path / "s") == {}
    before = stored_tensors(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    dense = from_float8(before[name], before[f"{name}_scale_inv"], (16, 16))
    after = stored_tensors(tmp_path / "s")[name]
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, dense)
    assert torch.allclose(after.float(), dense.float(), atol=0.05)


def test_lists_of_modules_and_scales_of_activations_follow_their_layers(tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3")
    scale = "model.layers.{}.mlp.up_proj.activation_scale"
    scales = {scale.format(n): torch.tensor(float(n)) for n in range(3)}
    save_in(folder, {**load_file(folder / "model.safetensors"), **scales}, 1)
    names = [
        "lm_head", "model.layers.1.mlp.up_proj", "model.layers.2.mlp", "re:.*norm$",
        r"re:.*layers\.[12]\.mlp\.down_proj", "model.layers.*.self_attn",
    ]  # fmt: skip
    describe_as(folder, {**described(folder), "modules_to_not_convert": names})
    cut_checkpoint(folder, Cut(layers=(0, 2)), tmp_path / "c")
    assert described(tmp_path / "c")["modules_to_not_convert"] == [
        "lm_head", "model.layers.1.mlp", "re:.*norm$", "model.layers.1.mlp.down_proj",
        "model.layers.*.self_attn",
    ]  # fmt: skip
    after = stored_tensors(tmp_path / "c")
    assert [float(after[scale.format(n)]) for n in (0, 1)] == [0.0, 2.0]


@pytest.mark.parametrize("family", ["gemma3 vision", "llava"])
def test_layers_of_a_vision_tower_keep_their_numbers(tmp_path: Path, family: str) -> None:
    folder = in_float8(tmp_path / "m", family)
    tower = ["model.vision_tower.encoder.layers.1.mlp.fc1", "encoder.layers.2.mlp.fc2"]
    mine = "model.language_model.layers.2.mlp"
    describe_as(folder, {**described(folder), "modules_to_not_convert": [*tower, mine]})
    cut_checkpoint(folder, Cut(layers=(0, 2)), tmp_path / "c")
    renumbered = "model.language_model.layers.1.mlp"
    assert described(tmp_path / "c")["modules_to_not_convert"] == [*tower, renumbered]


def test_the_description_of_a_decoder_inside_gets_the_new_numbers(tmp_path: Path) -> None:
    """A model that sees may describe the form of its decoder in `text_config`."""
    folder = in_float8(tmp_path / "m", "qwen3_vl")
    file, place = folder / "config.json", "model.language_model.layers"
    config = json.loads(file.read_text())
    description = config.pop("quantization_config")
    description["modules_to_not_convert"] = ["lm_head", f"{place}.1.mlp", f"{place}.2.mlp.up_proj"]
    config["text_config"]["quantization_config"] = description
    file.write_text(json.dumps(config))
    cut_checkpoint(folder, Cut(layers=(0, 2)), tmp_path / "c")
    after = json.loads((tmp_path / "c" / "config.json").read_text())
    assert "quantization_config" not in after
    renumbered = ["lm_head", f"{place}.1.mlp.up_proj"]
    expected = {**description, "modules_to_not_convert": renumbered}
    assert after["text_config"]["quantization_config"] == expected
    assert after["text_config"]["num_hidden_layers"] == 2
    cut_checkpoint(folder, Cut(neurons={n: tuple(range(16)) for n in range(3)}), tmp_path / "d")
    dense = json.loads((tmp_path / "d" / "config.json").read_text())
    assert "quantization_config" not in dense["text_config"]


def test_layers_and_experts_of_a_model_in_microscaled_float4(tmp_path: Path) -> None:
    folder = fused_in_float4(tmp_path / "m", num_local_experts=4)
    before, kept = stored_tensors(folder), {0: (0, 3), 1: (1, 2), 2: (0, 2)}
    cut_checkpoint(folder, Cut(layers=LAYERS), tmp_path / "c")
    cut_checkpoint(folder, Cut(experts=kept), tmp_path / "e")
    for name, tensor in stored_tensors(tmp_path / "c").items():
        assert same_bytes(tensor, before[name.replace("layers.1.", "layers.2.")]), name
    for name, tensor in stored_tensors(tmp_path / "e").items():
        fewer = ".experts." in name or ".router." in name
        rows = list(kept[int(name.split(".")[2])]) if fewer else slice(None)
        assert same_bytes(tensor, before[name][rows]), name
    assert described(tmp_path / "c") == described(tmp_path / "e") == described(folder)
    whole, cut, few = (
        transformers.AutoModelForCausalLM.from_pretrained(x)
        for x in (folder, tmp_path / "c", tmp_path / "e")
    )
    name = "mlp.experts.gate_up_proj"
    expected = whole.get_parameter(f"model.layers.2.{name}")
    assert torch.equal(cut.get_parameter(f"model.layers.1.{name}"), expected)
    assert torch.equal(open_weights(tmp_path / "c").read(f"model.layers.1.{name}"), expected)
    assert len(cut.config.layer_types) == 2
    assert few.config.num_local_experts == 2
    assert few(torch.arange(5)[None]).logits.isfinite().all()


def test_experts_in_microscaled_float4_are_pruned(tmp_path: Path) -> None:
    folder, text = fused_in_float4(tmp_path / "m", num_local_experts=4), text_file(tmp_path)
    secateur.import_model(folder, output=tmp_path / "dense")
    options: dict[str, Any] = {
        "method": "wanda", "sparsity": 0.5, "windows": 3, "sequence_length": 24,
        "calibration": text,
    }  # fmt: skip
    secateur.prune(tmp_path / "dense", output=tmp_path / "d", **options)
    secateur.prune(folder, output=tmp_path / "p", **options)
    kept = secateur.prune(folder, output=tmp_path / "k", keep_format=True, **options)
    assert kept.manifest.formats == {"source": "mxfp4", "result": "mxfp4"}
    theirs = stored_tensors(tmp_path / "d")
    ours, again = open_weights(tmp_path / "p"), open_weights(tmp_path / "k")
    for name, tensor in theirs.items():
        assert torch.equal(ours.read(name), tensor), name
        assert torch.equal(again.read(name), tensor), name
    experts = theirs["model.layers.1.mlp.experts.down_proj"]
    assert (experts == 0).float().mean() > 0.45
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "k")
    scales = [name for name in before if name.endswith("_scales")]
    assert all(same_bytes(before[name], after[name]) for name in scales)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "k")
