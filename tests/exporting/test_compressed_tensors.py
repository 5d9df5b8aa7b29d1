"""Folders of compressed-tensors: read by hand, and by the library itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from at_rest import stored_tensors
from safetensors.torch import load_file
from tiny import save_tiny
from torch import Tensor
from zoo import PLAIN_MIXTURES, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import ExportError, ShapeError
from secateur.models.opening import load_whole
from secateur.models.skeleton import quiet_transformers

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Every row is a multiple of 64 weights long."""

UP = "model.layers.1.mlp.up_proj"


def export(folder: Path, source: Path, type: str) -> Any:
    return secateur.export(source, output=folder, to="compressed-tensors", type=type).exported


Pruned = Callable[..., Path]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Prune a model of some sizes once; no test changes it."""

    @functools.cache
    def made(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("pruned")
        save_tiny(folder / "dense", **{**WIDE, **options})
        secateur.prune(folder / "dense", output=folder / "pruned", method="magnitude", sparsity=0.5)
        return folder / "pruned"

    return made


def config_of_folder(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The integers of words, one after the other."""
    rows = []
    for row in words.tolist():
        numbers = []
        for word in row:
            unsigned = word % 2**32
            for place in range(32 // bits):
                numbers.append((unsigned >> (bits * place)) % 2**bits - 2 ** (bits - 1))
        rows.append(numbers[:columns])
    return torch.tensor(rows, dtype=torch.int8)


def weight_in(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """The weight that the tensors of a linear stand for."""
    scale = tensors[f"{name}.weight_scale"].float()
    if f"{name}.weight" in tensors:
        codes = tensors[f"{name}.weight"]
    else:
        out, columns = tensors[f"{name}.weight_shape"].tolist()
        codes = unpacked(tensors[f"{name}.weight_packed"], bits, columns)
        assert codes.shape == (out, columns)
    group = codes.shape[1] // scale.shape[1]
    return codes.float() * scale.repeat_interleave(group, dim=1)


@pytest.mark.parametrize(("type", "bits"), [("w8a8", 8), ("w8a16", 8), ("w4a16", 4)])
def test_weights_come_back_within_half_a_step_and_zeros_exactly(
    type, bits, pruned: Pruned, tmp_path: Path
) -> None:
    source = pruned()
    made = export(tmp_path / "out", source, type)
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    weight, found = before[f"{UP}.weight"], weight_in(after, UP, bits)
    scale = after[f"{UP}.weight_scale"].float()
    step = scale.repeat_interleave(64 // scale.shape[1], dim=1)
    step, inside = step.abs(), weight.abs() <= (2 ** (bits - 1) - 1) * step.abs()
    assert ((found - weight).abs() <= 0.5001 * step)[inside].all()
    assert inside.float().mean() > 0.95
    assert torch.equal(found == 0, (weight / step).round() == 0)
    assert (
        made.zeros
        == made.zeros_kept
        == sum(int((x == 0).sum()) for n, x in before.items() if "_proj.weight" in n)
    )
    others = {n: x for n, x in before.items() if "_proj.weight" not in n}
    assert "model.layers.0.self_attn.q_proj.bias" in others
    assert all(torch.equal(after[n], x) for n, x in others.items())
    assert made.types == {f"int{bits}": 21, "float32": len(others)}


def test_the_configuration_says_how_to_read_it(pruned: Pruned, tmp_path: Path) -> None:
    source = pruned()
    for type, format, weights, activations in (
        ("w8a8", "int-quantized", (8, "channel", None), (8, "token", True)),
        ("w4a16", "pack-quantized", (4, "group", 64), None),
        ("w8a16", "pack-quantized", (8, "channel", None), None),
    ):
        export(tmp_path / type, source, type)
        config = config_of_folder(tmp_path / type)
        found = config["quantization_config"]
        (group,) = found["config_groups"].values()
        w, a = group["weights"], group["input_activations"]
        assert (w["num_bits"], w["strategy"], w["group_size"]) == weights
        assert w["symmetric"]
        assert (a and (a["num_bits"], a["strategy"], a["dynamic"])) == activations
        assert found["format"] == group["format"] == format
        assert found["quant_method"] == "compressed-tensors"
        assert "sparsity_config" not in found
        assert "lm_head" in found["ignore"]
        assert group["targets"] == ["Linear"]
        assert config["model_type"] == "llama"
        assert (tmp_path / type / "tokenizer.json").exists()
        assert (tmp_path / type / "generation_config.json").exists()


@pytest.mark.parametrize(("hidden", "ffn", "group"), [(128, 256, 128), (64, 128, 64), (32, 96, 32)])
def test_the_largest_group_that_divides_all_rows(hidden, ffn, group, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", hidden_size=hidden, intermediate_size=ffn, head_dim=hidden // 4,
              num_hidden_layers=1)  # fmt: skip
    export(tmp_path / "out", tmp_path / "m", "w4a16")
    scale = stored_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight_scale"]
    assert scale.shape == (hidden, ffn // group)


@pytest.mark.parametrize("values", ["int4", "int3", "int2"])
@pytest.mark.parametrize("group", [32, 64])
def test_a_model_on_a_grid_is_stored_without_rounding(
    values, group, pruned: Pruned, tmp_path: Path
) -> None:
    """Also as a dense checkpoint, and though a larger group divides all rows."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    source = pruned(**sizes, num_hidden_layers=1)
    packed = secateur.compress(
        source, output=tmp_path / "packed", values=values, group_size=group
    ).output
    secateur.decompress(packed, output=tmp_path / "again")
    dense = secateur.load(packed, expand=True, dtype=torch.float32).state_dict()
    for number, folder in enumerate((packed, tmp_path / "again")):
        made = export(tmp_path / f"out{number}", folder, "w4a16")
        found = stored_tensors(tmp_path / f"out{number}")
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            name = f"model.layers.0.{name}"
            assert torch.equal(weight_in(found, name, 4), dense[f"{name}.weight"])
            assert (
                found[f"{name}.weight_scale"].shape[1] == dense[f"{name}.weight"].shape[1] // group
            )
            scale = found[f"{name}.weight_scale"].float()
            rows = weight_in(found, name, 4).view(len(scale), -1, group)
            lowest = (rows / scale[:, :, None]).amin(2) == -8
            assert torch.equal(scale < 0, lowest & (rows.amax(2) == -8 * scale))
            assert number == 1 or values == "int4" or not (scale < 0).any()
        assert not made.notes


@pytest.mark.parametrize("type", ["w8a8", "w8a16"])
def test_the_integers_of_an_int8_model_stay_what_they_are(
    type: str, pruned: Pruned, tmp_path: Path
) -> None:
    """And their scales, which the dense checkpoint in bfloat16 does not hold; also calibrated."""
    save_windows(tiny_windows(4, 20), tmp_path / "windows.safetensors")
    text = tmp_path / "windows.safetensors" if type == "w8a16" else None
    packed = secateur.compress(
        pruned(dtype=torch.bfloat16), output=tmp_path / "packed", values="int8", calibration=text
    ).output
    dense = secateur.load(packed, expand=True, dtype=torch.float32).state_dict()
    if type == "w8a16":
        packed = secateur.decompress(packed, output=tmp_path / "dense").output
    made = export(tmp_path / "out", packed, type)
    assert not any("rounded" in note for note in made.notes)
    if type == "w8a8":
        found = weight_in(stored_tensors(tmp_path / "out"), UP, 8)
        assert torch.equal(found, dense[f"{UP}.weight"])


def test_what_was_rounded_is_said(pruned: Pruned, tmp_path: Path) -> None:
    made = export(tmp_path / "out", pruned(), "w4a16")
    assert "21 of 21 matrices" in made.notes[0]
    assert "compress --values int4 --calibration TEXT" in made.notes[0]
    made = export(tmp_path / "eight", pruned(), "w8a8")
    assert "int8" in made.notes[1]


def test_files_stay_as_many_as_they_are(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", shards=3, **WIDE)
    export(tmp_path / "out", source, "w4a16")
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name in names:
        inside = load_file(tmp_path / "out" / name)
        assert {n for n, file in index["weight_map"].items() if file == name} == set(inside)


@pytest.mark.parametrize("family", sorted(PLAIN_MIXTURES))
def test_experts_are_stored_one_by_one_and_routers_stay(family, tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    save_tiny(tmp_path / "m", family, intermediate_size=64, **sizes)
    before = stored_tensors(tmp_path / "m")
    made = export(tmp_path / "out", tmp_path / "m", "w8a8")
    after = stored_tensors(tmp_path / "out")
    experts = [n for n in before if ".experts." in n]
    assert experts
    for name in experts:
        owner = name.removesuffix(".weight")
        assert (weight_in(after, owner, 8) - before[name]).abs().max() < 0.01
    routers = [n for n in before if n.endswith(("gate.weight", "shared_expert_gate.weight"))]
    ignored = config_of_folder(tmp_path / "out")["quantization_config"]["ignore"]
    assert routers
    for name in routers:
        assert torch.equal(after[name], before[name])
        assert name.removesuffix(".weight") in ignored
    assert made.types["int8"] == len([n for n in after if n.endswith(".weight_scale")])


def test_what_the_target_cannot_hold_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ExportError, match="12 matrices"):
        export(tmp_path / "out", tmp_path / "gpt2", "w8a8")
    save_tiny(tmp_path / "odd", intermediate_size=40)
    with pytest.raises(ShapeError, match="3 of 21"):
        export(tmp_path / "out", tmp_path / "odd", "w4a16")
    assert not (tmp_path / "out").exists()
    made = export(tmp_path / "out", tmp_path / "odd", "w8a8")
    assert any("refuse 15" in x for x in made.notes)


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed (pip install -e .[dev])"
    )


def test_evaluation_judges_rounded_weights_and_activations(
    library, pruned: Pruned, tmp_path: Path
) -> None:
    """What `secateur evaluate` loads rounds the inputs of linears too, about as an engine does."""
    source = pruned()
    export(tmp_path / "out", source, "w8a8")
    judged = load_whole(tmp_path / "out", torch.device("cpu"))
    ours, stored = secateur.load(source), stored_tensors(tmp_path / "out")
    linears = {n: m for n, m in ours.named_modules() if f"{n}.weight_scale" in stored}
    ids = tiny_windows(2, 12)

    def rounded(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        scale = inputs[0].abs().amax(dim=-1, keepdim=True) / 127
        return ((inputs[0] / scale).round() * scale,)

    with torch.no_grad():
        for name, module in linears.items():
            assert torch.equal(judged.get_submodule(name).weight, weight_in(stored, name, 8))
            module.weight.copy_(weight_in(stored, name, 8))
        theirs, weights_alone = judged.model(ids)[0], ours.model(ids)[0]
        for module in linears.values():
            module.register_forward_pre_hook(rounded)
        lost = (ours.model(ids)[0] - weights_alone).abs().mean()
    assert 0.5 * lost < (theirs - weights_alone).abs().mean() < 2 * lost


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("type", ["w8a16", "w4a16"])
def test_transformers_computes_with_the_stored_weights(
    family, type, library, pruned: Pruned, tmp_path: Path
) -> None:
    """Loaded by compressed-tensors, against the weights read by hand in a plain model."""
    source = pruned(family=family)
    export(tmp_path / "out", source, type)
    with quiet_transformers():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        )
        ours = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored = stored_tensors(tmp_path / "out")
    bits = int(type[1])
    with torch.no_grad():
        for name, module in ours.named_modules():
            if f"{name}.weight_scale" in stored:
                module.weight.copy_(weight_in(stored, name, bits))
        ids = tiny_windows(2, 12)
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
