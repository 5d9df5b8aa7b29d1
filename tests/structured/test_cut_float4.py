"""Mixtures whose experts are in 4-bit floating point: read for scoring, and cut byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from at_rest import (
    FLOAT4,
    FUSED_FLOAT4,
    described,
    fused_in_float4,
    in_float4,
    raw,
    stored_tensors,
    text_file,
)
from safetensors.torch import load_file, save_file
from slow import slow_but
from stopped_stage import StopAt, StoppedError

import secateur
from secateur.errors import ArchitectureError, CheckpointError, RecipeError
from secateur.models.opening import open_weights
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_checkpoint

SIZES: dict[str, Any] = {"moe_intermediate_size": 32, "decoder_sparse_step": 1}
FORMS = ("modelopt beside", "nvfp4-pack-quantized")
FUSED = ("mxfp4",)


def cut(folder: Path, output: Path, **more: Any) -> Any:
    """Three of five experts of each layer, chosen by calibration."""
    options: dict[str, Any] = {
        "calibration": text_file(folder.parent), "windows": 3, "sequence_length": 24,
        "experts": 3, "effort": "fast", **more,
    }  # fmt: skip
    return secateur.structure(folder, output=output, **options)


def scores_in(output: Path) -> Any:
    """What a cut has measured and kept."""
    return json.loads((output / "secateur" / "steps.json").read_text())


def assert_same_as_dense(folder: Path, output: Path, twin: Path) -> None:
    """A cut of a folder in few bits has the numbers of the cut of its dense twin."""
    reader, dense = open_weights(output), stored_tensors(twin)
    assert reader.entries.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.equal(reader.read(name), tensor), name
    assert scores_in(output) == scores_in(twin)


def kept_bytes(folder: Path, output: Path) -> int:
    """How many stored tensors of experts are those of the source, byte for byte; all must be."""
    before = {(n.rpartition(".")[2], t.dtype, tuple(t.shape), bytes(raw(t).numpy()))
              for n, t in stored_tensors(folder).items()}  # fmt: skip
    after = {n: t for n, t in stored_tensors(output).items() if ".experts." in n}
    for name, t in after.items():
        one = (name.rpartition(".")[2], t.dtype, tuple(t.shape), bytes(raw(t).numpy()))
        assert one in before, name
    return len(after)


@pytest.mark.parametrize("form", slow_but(FORMS, FLOAT4))
def test_experts_alone_are_scored_as_dense_ones_and_keep_their_bytes(
    form: str, tmp_path: Path
) -> None:
    folder = in_float4(tmp_path / "m", form, "qwen3_moe", shards=2, **SIZES)
    cut(folder, tmp_path / "s")
    cut(tmp_path / "m-dense", tmp_path / "d")
    assert_same_as_dense(folder, tmp_path / "s", tmp_path / "d")
    parts = {"modelopt": 4, "modelopt beside": 4, "nvfp4-pack-quantized": 4}.get(form, 2)
    assert kept_bytes(folder, tmp_path / "s") == 3 * 3 * 3 * parts
    assert described(tmp_path / "s") == described(folder)
    beside = "hf_quant_config.json"
    assert (folder / beside).exists() == (tmp_path / "s" / beside).exists()


@pytest.mark.parametrize("form", slow_but(("modelopt",), FUSED_FLOAT4))
def test_experts_of_a_layer_in_one_tensor(form: str, tmp_path: Path) -> None:
    folder = fused_in_float4(tmp_path / "m", form)
    cut(folder, tmp_path / "s")
    cut(tmp_path / "m-dense", tmp_path / "d")
    assert_same_as_dense(folder, tmp_path / "s", tmp_path / "d")
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "s")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        own = before[name]
        if own.shape[:1] == (5,) and ".mlp." in name:
            router = f"{name.partition('.mlp.')[0]}.mlp.router.weight"  # its rows are all different
            own = own[[(before[router] == row).all(1).nonzero().item() for row in after[router]]]
        assert torch.equal(raw(tensor), raw(own)), name
    assert described(tmp_path / "s") == described(folder)


BY = ("reap", "frequency", "aimer", "random", "divergence")


@pytest.mark.parametrize("by", slow_but((), BY))
def test_every_score_reads_the_form(by: str, tmp_path: Path) -> None:
    folder = in_float4(tmp_path / "m", "modelopt", "qwen3_moe", **SIZES)
    cut(folder, tmp_path / "s", experts_by=by)
    cut(tmp_path / "m-dense", tmp_path / "d", experts_by=by)
    assert_same_as_dense(folder, tmp_path / "s", tmp_path / "d")


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "fp8"])
def test_evaluation_reads_the_numbers_that_are_meant(form: str, tmp_path: Path) -> None:
    """transformers 5.24 drops the scale of a whole matrix in experts of NVFP4."""
    folder = in_float4(tmp_path / "m", form, "qwen3_moe", **SIZES)
    text = text_file(tmp_path)
    ours, theirs = (
        secateur.evaluate(x, text=text, sequence_length=24).perplexity
        for x in (folder, tmp_path / "m-dense")
    )
    assert ours == theirs
    if not form.startswith("nv"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m-dense")
        assert all(torch.equal(loaded[n], own) for n, own in dense.state_dict().items())


def test_layers_are_cut_and_descriptions_follow(tmp_path: Path) -> None:
    folder = in_float4(tmp_path / "m", "modelopt beside", "qwen3_moe", shards=3, **SIZES)
    file = folder / "hf_quant_config.json"
    described = json.loads(file.read_text())
    names = ["lm_head", "model.layers.0*", "model.layers.2.self_attn*", "mtp*"]
    algorithms = {f"model.layers.{n}.mlp.experts": {"quant_algo": "NVFP4"} for n in range(3)}
    described["quantization"] |= {"exclude_modules": names, "quantized_layers": algorithms}
    file.write_text(json.dumps(described))
    kept = {0: (0, 2), 1: (0, 1), 2: (1, 4)}
    cut_checkpoint(folder, Cut(layers=(1, 2), experts=kept), tmp_path / "c")
    after = json.loads((tmp_path / "c" / file.name).read_text())["quantization"]
    assert after["exclude_modules"] == ["lm_head", "model.layers.1.self_attn*", "mtp*"]
    assert list(after["quantized_layers"]) == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    before, cut_down = stored_tensors(folder), stored_tensors(tmp_path / "c")
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight_scale"
    assert torch.equal(raw(cut_down[name.format(1, 0)]), raw(before[name.format(2, 1)]))
    cut_checkpoint(folder, Cut(hidden=tuple(range(16))), tmp_path / "g")
    assert not (tmp_path / "g" / file.name).exists()
    assert {t.dtype for t in stored_tensors(tmp_path / "g").values()} == {torch.bfloat16}


def test_a_killed_cut_goes_on(tmp_path: Path) -> None:
    folder = in_float4(tmp_path / "m", "modelopt", "qwen3_moe", shards=2, **SIZES)
    cut(folder, tmp_path / "whole")
    with pytest.raises(StoppedError):
        cut(folder, tmp_path / "s", progress=StopAt("cutting", 5))
    assert not (tmp_path / "s").exists()
    cut(folder, tmp_path / "s", resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "s" / file.name).read_bytes()


STEM = "model.layers.1.mlp.experts.2.down_proj"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("weight_scale", None),
        ("weight_scale", torch.ones(32, 1).to(torch.float8_e4m3fn)[:16]),
        ("weight_scale", torch.ones(32, 2)),
        ("weight_scale_2", torch.ones(3)),
        ("weight_scale_2", torch.tensor(1, dtype=torch.int32)),
        ("weight_scale_2", torch.tensor(3e38)),
        ("weight", torch.zeros(32, 16, dtype=torch.int16)),
        ("pre_quant_scale", torch.ones(32)),
    ],
)
def test_damaged_parts_are_refused_by_name(
    part: str, value: torch.Tensor | None, tmp_path: Path
) -> None:
    folder = in_float4(tmp_path / "m", "modelopt", "qwen3_moe", **SIZES)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{STEM}.{part}"] = torch.ones(()) if value is None else value.contiguous()
    if value is None:
        del tensors[f"{STEM}.{part}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((CheckpointError, ArchitectureError)) as raised:
        cut(folder, tmp_path / "s", experts_by="aimer")
    assert STEM in str(raised.value)


def test_what_changes_numbers_is_dense_or_refused(tmp_path: Path) -> None:
    folder = in_float4(tmp_path / "m", "modelopt", "qwen3_moe", **SIZES)
    options: dict[str, Any] = {
        "method": "magnitude", "sparsity": 0.5, "calibration": text_file(tmp_path),
    }  # fmt: skip
    made = secateur.prune(folder, output=tmp_path / "p", **options)
    secateur.prune(tmp_path / "m-dense", output=tmp_path / "d", **options)
    ours, theirs = stored_tensors(tmp_path / "p"), stored_tensors(tmp_path / "d")
    assert made.manifest.formats == {"source": "modelopt", "result": "bfloat16"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(RecipeError):
        secateur.prune(folder, output=tmp_path / "k", keep_format=True, **options)
    with pytest.raises(CheckpointError) as raised:
        secateur.compress(folder, output=tmp_path / "c")
    assert "secateur import" in raised.value.remedy
    secateur.import_model(folder, output=tmp_path / "i")
    imported = stored_tensors(tmp_path / "i")
    assert all(torch.equal(imported[n], t) for n, t in stored_tensors(tmp_path / "m-dense").items())
    assert "uint8" in str(secateur.inspect(folder))


def test_deepseek_v4_as_published(tmp_path: Path) -> None:
    """Experts in MXFP4 beside FP8, and layers in which a table names the experts of each token."""
    folder = in_float4(tmp_path / "m", "fp8", "deepseek_v4", moe_intermediate_size=32)
    cut(folder, tmp_path / "s", experts=4)
    cut(tmp_path / "m-dense", tmp_path / "d", experts=4)
    assert_same_as_dense(folder, tmp_path / "s", tmp_path / "d")
    assert kept_bytes(folder, tmp_path / "s") == 3 * 4 * 3 * 2
    (table,) = (t for n, t in stored_tensors(tmp_path / "s").items() if n.endswith("tid2eid"))
    assert table.unique().tolist() == [0, 1, 2, 3]
    assert (table[:, 0] != table[:, 1]).all()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    for name, own in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], own), name
