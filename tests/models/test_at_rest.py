"""Formats at rest are read as what they mean, by every verb that reads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from at_rest import (
    E2M1,
    describe_as,
    described,
    everywhere,
    from_float8,
    from_microscaled,
    in_float8,
    packed_words,
    raw,
    stored_tensors,
    text_file,
    to_float8,
    to_microscaled,
)
from safetensors.torch import load_file, save_file
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import secateur
from secateur.errors import ArchitectureError, CheckpointError, RecipeError
from secateur.models.at_rest import AssembledReader
from secateur.models.opening import load_whole, open_weights

WIDE_EXPERTS = {"moe_intermediate_size": 32}
PRUNED: dict[str, Any] = {
    "method": "wanda", "sparsity": 0.5, "windows": 3, "sequence_length": 24,
}  # fmt: skip


def reader_of(folder: Path) -> AssembledReader:
    """The reader of a folder in some form."""
    reader = open_weights(folder)
    assert isinstance(reader, AssembledReader)
    return reader


def one_matrix(place: Path, quantization: dict[str, Any], **parts: torch.Tensor) -> Path:
    """A folder with the parts of one matrix."""
    place.mkdir(exist_ok=True)
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": quantization}
    (place / "config.json").write_text(json.dumps(config))
    save_file({k.replace("__", "."): v for k, v in parts.items()}, place / "model.safetensors")
    return place


FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e8m0fnu", "bytes", "one number"])
def test_float8_in_blocks_is_what_an_oracle_makes_of_it(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, scales = to_float8(torch.randn(7, 12), (4, 8))  # the last blocks are shorter
    exponents = torch.tensor([[3, -2], [0, -7]])
    wide = torch.exp2(exponents.float())
    stored = {
        "float32": scales,
        "bfloat16": wide.bfloat16(),
        "float8_e8m0fnu": (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu),
        "bytes": (exponents + 127).to(torch.uint8),
        "one number": torch.tensor(0.25),
    }[kind]
    wide = {"float32": scales, "one number": torch.full((2, 2), 0.25)}.get(kind, wide)
    folder = one_matrix(tmp_path / "m", FP8, a__weight=codes, a__weight_scale_inv=stored)
    everywhere(reader_of(folder), lambda _: from_float8(codes, wide, (4, 8)))


def test_float8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    codes = torch.where(codes.float().isnan(), torch.zeros(()), codes.float()).to(codes.dtype)
    torch.manual_seed(0)
    scales = torch.rand(4, 2) * 1e-3
    folder = one_matrix(tmp_path / "m", FP8, a__weight=codes, a__weight_scale_inv=scales)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    everywhere(reader_of(folder), lambda _: theirs)


def test_stacked_experts_in_float8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    apart = [to_float8(torch.randn(8, 16), (4, 8)) for _ in range(3)]
    codes, scales = (torch.stack(x) for x in zip(*apart, strict=True))
    folder = one_matrix(
        tmp_path / "m", FP8, e__gate_up_proj=codes, e__gate_up_proj_scale_inv=scales
    )
    expected = torch.stack([from_float8(c, s, (4, 8)) for c, s in apart])
    everywhere(reader_of(folder), lambda _: expected)


def test_microscaled_float4_is_what_an_oracle_and_transformers_make_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 3, 2), dtype=torch.uint8)
    folder = one_matrix(
        tmp_path / "m", {"quant_method": "mxfp4"}, e__down_proj_blocks=blocks,
        e__down_proj_scales=scales,
    )  # fmt: skip
    reader = reader_of(folder)
    everywhere(reader, lambda _: from_microscaled(blocks, scales))
    everywhere(reader, lambda _: convert_moe_packed_tensors(blocks, scales))
    assert reader.entries["e.down_proj"].shape == (2, 64, 3)


ONE_EACH = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""What GPTQModel takes from a whole word of zeros in the layout gptq, by bits."""


@pytest.mark.parametrize(
    ("layout", "bits"),
    [*((x, b) for x in ("gptq", "gptq_v2", "any order") for b in (2, 4, 8)), ("awq", 4)],
)
def test_integers_in_groups_are_what_an_oracle_makes_of_them(
    layout: str, bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inputs, outputs, groups = 16, 48, 4
    codes, zeros = (torch.randint(0, 2**bits, (n, outputs)) for n in (inputs, groups))
    zeros[:, ::5] = 0
    zeros[0, :16] = 0
    scales = torch.rand(groups, outputs).half()
    order = torch.arange(inputs) // (inputs // groups)
    parts: dict[str, torch.Tensor] = {"a__scales": scales}
    if layout == "awq":
        quantization: dict[str, Any] = {"quant_method": "awq", "bits": 4, "version": "gemm"}
        parts["a__qweight"] = packed_words(codes, (0, 2, 4, 6, 1, 3, 5, 7))
        parts["a__qzeros"] = packed_words(zeros, (0, 2, 4, 6, 1, 3, 5, 7))
    else:
        quantization = {"quant_method": "gptq", "bits": bits}
        if layout == "gptq_v2":
            quantization["checkpoint_format"] = layout
        if layout == "any order":
            order = order[torch.randperm(inputs)]
        fields = tuple(range(32 // bits))
        lower = 0 if layout == "gptq_v2" else ONE_EACH[bits]
        parts["a__qweight"] = packed_words(codes.t(), fields).t().contiguous()
        parts["a__qzeros"] = packed_words(zeros, fields, lower)
        parts["a__g_idx"] = order.to(torch.int32)
    expected = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    for o in range(outputs):
        for i in range(inputs):
            g = int(order[i])
            expected[o, i] = int(codes[i, o] - zeros[g, o]) * float(scales[g, o])
    everywhere(reader_of(one_matrix(tmp_path / "m", quantization, **parts)), lambda _: expected)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
    ],
)
def test_other_layouts_of_integers_are_refused(
    quantization: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match=said):
        open_weights(one_matrix(tmp_path / "m", quantization, a__weight=torch.zeros(2, 2)))


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
def test_a_form_that_no_matrix_has_is_refused(method: str, tmp_path: Path) -> None:
    quantization = {"quant_method": method, "bits": 4}
    with pytest.raises(CheckpointError, match="no matrix"):
        open_weights(one_matrix(tmp_path / "m", quantization, a__weight=torch.zeros(2, 2)))


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_new_values_are_rounded_to_the_stored_scales(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if form == "fp8":
        codes, scales = to_float8(torch.randn(8, 16), (4, 8))
        folder = one_matrix(tmp_path / "m", FP8, a__weight=codes, a__weight_scale_inv=scales)
        grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        grid, name = grid[grid.isfinite()], "a.weight"
        spread = scales.repeat_interleave(4, 0).repeat_interleave(8, 1)
    else:
        blocks, exponents = to_microscaled(torch.randn(2, 64, 3))
        quantization = {"quant_method": "mxfp4"}
        folder = one_matrix(
            tmp_path / "m", quantization, e__down_proj_blocks=blocks, e__down_proj_scales=exponents
        )
        grid, name = torch.tensor([*E2M1, *(-x for x in E2M1)]), "e.down_proj"
        spread = torch.exp2(exponents.float() - 127).repeat_interleave(32, -1).transpose(1, 2)
    reader = reader_of(folder)
    assembly, before = reader.made[name], reader.whole(name)
    parts = {role: reader.stored.read(part) for role, part in assembly.parts.items()}
    assert assembly.back is not None
    same = assembly.back(before, parts)
    assert all(torch.equal(raw(same[role]), raw(parts[role])) for role in parts)
    wanted = before.clone()
    wanted.view(-1)[::3] = 0
    wanted.view(-1)[1::3] *= 0.7
    after = assembly.make(assembly.back(wanted, parts))
    assert not after[wanted == 0].any()
    assert torch.equal(after.to(before.dtype)[wanted == before], before[wanted == before])
    nearest = (wanted.float()[..., None] - grid * spread[..., None]).abs().amin(-1)
    assert torch.allclose((wanted.float() - after.float()).abs(), nearest, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_whole_model_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    sizes = WIDE_EXPERTS if family == "qwen3_moe" else {}
    folder = in_float8(tmp_path / "m", family, shards=2, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = load_whole(folder, torch.device("cpu")).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("sizes", "description"), [({"intermediate_size": 24}, {}), ({}, {"quant_method": "fp8"})]
)
def test_blocks_of_a_whole_model(sizes: dict, description: dict, tmp_path: Path) -> None:
    """Named ones, though transformers makes 12 of 24 rows in 2; else by the shape of the scales."""
    folder = in_float8(tmp_path / "m", "qwen3", **sizes)
    describe_as(folder, description or described(folder))
    model = load_whole(folder, torch.device("cpu"))
    stored = stored_tensors(folder)
    expected = from_float8(stored[MATRIX], stored[f"{MATRIX}_scale_inv"], (16, 16))
    assert torch.equal(model.get_parameter(MATRIX), expected)


def dense_twin(folder: Path, place: Path, family: str, **sizes: Any) -> Path:
    """The same model in bfloat16, as the oracle reads it."""
    save_tiny(place, family, dtype=torch.bfloat16, **sizes)
    stored, made = stored_tensors(folder), {}
    for name, tensor in stored.items():
        scales = stored.get(f"{name}_scale_inv")
        if not name.endswith("_scale_inv"):
            made[name] = tensor if scales is None else from_float8(tensor, scales, (16, 16))
    save_file(made, place / "model.safetensors", metadata={"format": "pt"})
    return place


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two folders have the same names and values."""
    ours, theirs = stored_tensors(one), stored_tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_pruning_is_that_of_the_dense_model(family: str, tmp_path: Path) -> None:
    sizes = WIDE_EXPERTS if family == "qwen3_moe" else {}
    folder = in_float8(tmp_path / "m", family, shards=2, **sizes)
    dense = dense_twin(folder, tmp_path / "dense", family, **sizes)
    text = text_file(tmp_path)
    plan = secateur.prune(folder, dry_run=True, calibration=text, **PRUNED)
    assert plan is not None
    made = secateur.prune(folder, output=tmp_path / "p", calibration=text, **PRUNED)
    secateur.prune(dense, output=tmp_path / "d", calibration=text, **PRUNED)
    assert_same_tensors(tmp_path / "p", tmp_path / "d")
    assert made.manifest.formats == {"source": "fp8", "result": "bfloat16"}
    assert described(tmp_path / "p") == {}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "p")


def test_zeros_go_back_into_the_stored_format(tmp_path: Path) -> None:
    folder, text = in_float8(tmp_path / "m", "qwen3", shards=2), text_file(tmp_path)
    secateur.prune(folder, output=tmp_path / "p", calibration=text, **PRUNED)
    kept = secateur.prune(
        folder, output=tmp_path / "k", calibration=text, keep_format=True, **PRUNED
    )
    assert kept.manifest.formats == {"source": "fp8", "result": "fp8"}
    assert kept.sparsity == pytest.approx(0.5)
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "k")
    dense, reader = stored_tensors(tmp_path / "p"), reader_of(tmp_path / "k")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if tensor.dtype == torch.float8_e4m3fn:
            stays = tensor.float() != 0
            assert torch.equal(tensor.float()[stays], before[name].float()[stays])
            assert torch.equal(reader.read(name), dense[name])
        else:
            assert torch.equal(raw(tensor), raw(before[name]))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "k")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(loaded.get_parameter(name), dense[name])


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    folder, text = in_float8(tmp_path / "m", "qwen3"), text_file(tmp_path)
    secateur.prune(folder, output=tmp_path / "whole", calibration=text, **PRUNED)
    for keep_format in (False, True):
        output = tmp_path / f"again-{keep_format}"
        run: dict[str, Any] = {
            "output": output, "calibration": text, "keep_format": keep_format, **PRUNED,
        }  # fmt: skip
        with pytest.raises(StoppedError):
            secateur.prune(folder, progress=StopAt("pruning", 2), **run)
        assert not output.exists()
        secateur.prune(folder, resume=True, **run)
        ours = open_weights(output)
        for name, tensor in stored_tensors(tmp_path / "whole").items():
            assert torch.equal(ours.read(name), tensor)


def test_keeping_the_format_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    dense, folder = save_tiny(tmp_path / "dense", "qwen3"), in_float8(tmp_path / "m", "qwen3")
    options: dict[str, Any] = {"calibration": text_file(tmp_path), "keep_format": True, **PRUNED}
    for source, more, said in (
        (dense, {}, "plain numbers"),
        (folder, {"distill_epochs": 1}, "distillation"),
        (folder, {"compress": "int8"}, "keep_format"),
    ):
        with pytest.raises(RecipeError, match=said):
            secateur.prune(source, output=tmp_path / "x", **options, **more)
    assert not (tmp_path / "x").exists()
    model = load_whole(folder, torch.device("cpu"))
    with pytest.raises(RecipeError, match="keep_format"):
        secateur.prune(model, calibration=torch.ones(2, 8, dtype=torch.int64), keep_format=True)


def test_other_verbs_read_it(tmp_path: Path) -> None:
    folder, text = in_float8(tmp_path / "m", "qwen3"), text_file(tmp_path)
    dense = dense_twin(folder, tmp_path / "dense", "qwen3")
    assert "float8_e4m3fn" in str(secateur.inspect(folder))
    judged = (secateur.evaluate(x, text=text, sequence_length=24) for x in (folder, dense))
    assert len({one.perplexity for one in judged}) == 1
    assert secateur.import_model(folder, output=tmp_path / "out").record.kind == "fp8"
    assert_same_tensors(tmp_path / "out", dense)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantize"),
        ({"quant_method": "hqq"}, "float32, bfloat16 or float16"),
        ({"quant_method": "of-tomorrow"}, "float32, bfloat16 or float16"),
    ],
)
def test_other_forms_are_refused_by_name(
    quantization: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "m", "qwen3")
    describe_as(tmp_path / "m", quantization)
    options: dict[str, Any] = {"output": tmp_path / "x", "calibration": text_file(tmp_path)}
    for verb, more in ((secateur.prune, PRUNED), (secateur.structure, {"keep_layers": 2})):
        with pytest.raises(CheckpointError, match=quantization["quant_method"]) as caught:
            verb(tmp_path / "m", **options, **more)
        assert said in str(caught.value)


MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{MATRIX}_scale_inv"), "there is no scale of it"),
        (lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(2, 5)}), "in blocks of"),
        (lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(5, 2)}), "in blocks of"),
        (lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(3, 2, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({f"{MATRIX}_scale_inv": torch.full((3, 2), torch.inf)}), "not finite"),
        (lambda t: t.update({MATRIX: torch.zeros(48, 32, dtype=torch.uint8)}), "powers? of two"),
    ],
)
def test_damaged_parts_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises((CheckpointError, ArchitectureError), match=said):
        secateur.inspect(folder)


@pytest.mark.parametrize("size", [[0, 16], [16], "16", [16, 16.0]])
def test_impossible_blocks_are_refused(size: Any, tmp_path: Path) -> None:
    folder = in_float8(tmp_path / "m", "qwen3")
    describe_as(folder, {"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(CheckpointError, match="weight_block_size"):
        secateur.inspect(folder)


def test_microscaled_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    blocks = torch.zeros(2, 3, 2, 16, dtype=torch.uint8)
    quantization, scales = {"quant_method": "mxfp4"}, torch.zeros(2, 3, 2, dtype=torch.uint8)
    for wrong in ({}, {"e__down_proj_scales": scales[:1]}, {"e__down_proj_scales": scales.float()}):
        parts = {"e__down_proj_blocks": blocks, **wrong}
        with pytest.raises(CheckpointError, match="down_proj"):
            open_weights(one_matrix(tmp_path / "m", quantization, **parts))
