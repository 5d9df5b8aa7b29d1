"""Files that compressed-tensors 0.12.2 wrote, read without it; and files that it never wrote."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from library import GOLDEN, SCHEMES, ZEROS, digest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import ArchitectureError, CheckpointError, SecateurError
from secateur.importing import import_formats
from secateur.models.at_rest import SourceFolder
from secateur.models.checkpoint import CheckpointReader

CASES = (*ZEROS, *SCHEMES)
Parts = dict[str, Tensor]


def golden(case: str) -> tuple[Parts, dict[str, Any]]:
    """The parts of a matrix, and what the library says of it."""
    with safe_open(GOLDEN, framework="pt") as stored:
        described = json.loads(stored.metadata()[case])
        names = [n for n in stored.keys() if n.partition("/")[0] == case]  # noqa: SIM118
        return {n.partition("/")[2]: stored.get_tensor(n) for n in names}, described


def read(place: Path, parts: Parts, config: dict[str, Any]) -> Any:
    """The reader of a folder with one matrix."""
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({"quantization_config": config}))
    named = {f"layer.{name}": x.contiguous() for name, x in parts.items()}
    save_file(named, place / "model.safetensors")
    source = SourceFolder(
        place, {"quantization_config": config}, CheckpointReader(place), torch.bfloat16
    )
    kinds = [kind for kind in import_formats if import_formats[kind].recognises(source)]
    assert kinds == ["compressed-tensors"]
    return import_formats[kinds[0]].open(source)


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_that_the_library_meant(case: str, tmp_path: Path) -> None:
    parts, described = golden(case)
    reader = read(tmp_path, parts, described["config"])
    assert list(reader.entries) == ["layer.weight"]
    weight = reader.read("layer.weight")
    assert weight.dtype == torch.bfloat16
    assert digest(weight) == described["digest"]
    assert ((weight == 0).float().mean() - 0.5).abs() < 0.08
    assert "quantization_config" not in reader.config


def test_exact_and_rounded_values_are_distinguished(tmp_path: Path) -> None:
    parts, described = golden("pack int4 groups")
    reader = read(tmp_path / "a", parts, described["config"])
    reader.read("layer.weight")
    assert reader.rounded == {"layer.weight": True}  # 3 bits times 8 bits
    short = parts["weight_scale"].view(torch.int16) & ~0b1111
    parts["weight_scale"] = short.view(torch.bfloat16)  # scales of 4 bits
    reader = read(tmp_path / "b", parts, described["config"])
    reader.read("layer.weight")
    assert reader.rounded == {"layer.weight": False}


def test_early_files_have_parts_below_the_tensor_and_vectors_too(tmp_path: Path) -> None:
    """SparseML wrote `layer.weight.bitmask`; a norm has one row."""
    parts, described = golden("sparse-bitmask")
    early = {f"weight.{role}": x for role, x in parts.items()}
    early |= {
        "norm.weight.compressed": torch.tensor([1.0, 2.0]), "norm.weight.shape": torch.tensor([10]),
        "norm.weight.bitmask": torch.tensor([0b10000001, 0], dtype=torch.uint8),
        "norm.weight.row_offsets": torch.tensor(0),
    }  # fmt: skip
    reader = read(tmp_path, early, described["config"])
    assert digest(reader.read("layer.weight")) == described["digest"]
    assert reader.read("layer.norm.weight").tolist() == [1, 0, 0, 0, 0, 0, 0, 2, 0, 0]


def test_columns_in_another_order_and_blocks(tmp_path: Path) -> None:
    order = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    parts = {
        "weight": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int8),
        "weight_scale": torch.tensor([[10.0, 100.0], [1.0, 1000.0]]),
        "weight_g_idx": order,
    }
    reader = read(tmp_path / "a", parts, {"quant_method": "compressed-tensors"})
    expected = [[100, 20, 30, 400], [5000, 6, 7, 8000]]
    assert torch.equal(reader.read("layer.weight"), torch.tensor(expected).bfloat16())
    parts["weight_g_idx"] = torch.full((4,), -1, dtype=torch.int32)
    reader = read(tmp_path / "b", parts, {"quant_method": "compressed-tensors"})
    expected = [[10, 20, 300, 400], [5, 6, 7000, 8000]]
    assert torch.equal(reader.read("layer.weight"), torch.tensor(expected).bfloat16())
    del parts["weight_g_idx"]
    parts["weight_scale"] = torch.tensor([[2.0, 3.0]])  # one block of both rows, two of columns
    reader = read(tmp_path / "c", parts, {"quant_method": "compressed-tensors"})
    assert reader.read("layer.weight").tolist() == [[2, 4, 9, 12], [10, 12, 21, 24]]


def test_words_without_unused_bits(tmp_path: Path) -> None:
    """Later releases pack so; integers of 3, 5, 6 and 7 bits cross the ends of words."""
    helpers = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    random = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        lowest = -(2 ** (bits - 1))
        codes = torch.randint(lowest, -lowest, (8, 96), generator=random, dtype=torch.int8)
        zeros = torch.randint(lowest, -lowest, (8, 3), generator=random, dtype=torch.int8)
        parts = {
            "weight_packed": helpers.pack_to_int32(codes, bits),
            "weight_zero_point": helpers.pack_to_int32(zeros, bits, packed_dim=0),
            "weight_shape": torch.tensor(codes.shape),
            "weight_scale": torch.ones(8, 3),
        }
        weights = {"weights": {"num_bits": bits}}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": weights}}
        expected = codes.double() - zeros.double().repeat_interleave(32, 1)
        assert torch.equal(read(tmp_path, parts, config).read("layer.weight").double(), expected)


SHORT_FLOATS = {
    "nvfp4-pack-quantized": (4, "tensor_group", 16),
    "mxfp4-pack-quantized": (4, "group", 32),
    "mxfp8-quantized": (8, "group", 32),
}


@pytest.mark.parametrize("format", SHORT_FLOATS)
def test_short_floats_are_those_of_the_library(format: str, tmp_path: Path) -> None:
    room = importlib.import_module("compressed_tensors.compressors")
    schemes = importlib.import_module("compressed_tensors.quantization")
    random, (bits, strategy, group) = torch.Generator().manual_seed(0), SHORT_FLOATS[format]
    shape, nvidia = (8, 128 // group), format.startswith("nv")
    exponents = torch.randint(110, 130, shape, generator=random, dtype=torch.uint8)
    tenths = (torch.rand(shape, generator=random) + 0.5).to(torch.float8_e4m3fn)
    parts = {"weight_scale": tenths if nvidia else exponents}
    if bits == 4:
        pairs = torch.randint(0, 256, (8, 64), generator=random, dtype=torch.uint8)
        parts["weight_packed"] = pairs
    else:
        parts["weight"] = torch.randn(8, 128, generator=random).to(torch.float8_e4m3fn)
    if nvidia:
        parts["weight_global_scale"] = torch.tensor([4.0])
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": group}
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=weights)
    library = room.BaseCompressor.get_value_from_registry(format)
    expected = library.decompress(parts, scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": format}
    assert torch.equal(read(tmp_path, parts, config).read("layer.weight"), expected.bfloat16())


def test_scales_of_activations_are_dropped_and_said(tmp_path: Path) -> None:
    parts, described = golden("int8 channels")
    parts["input_scale"] = torch.ones(1)
    described["config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    reader = read(tmp_path, parts, described["config"])
    assert reader.dropped == ("layer.input_scale",)
    assert "also rounds activations" in reader.notes[0]
    assert list(reader.entries) == ["layer.weight"]


def drop(role: str) -> Callable[[Parts], None]:
    def dropped(parts: Parts) -> None:
        del parts[role]

    return dropped


def put(role: str, change: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def changed(parts: Parts) -> None:
        parts[role] = change(parts[role])

    return changed


BROKEN: dict[str, tuple[str, Callable[[Parts], None], str]] = {
    "no values": ("sparse-bitmask", drop("compressed"), "no compressed"),
    "no shape": ("sparse-24-bitmask", drop("shape"), "no shape"),
    "a value less": ("sparse-bitmask", put("compressed", lambda x: x[:-1]), "are stored"),
    "other offsets": ("sparse-bitmask", put("row_offsets", lambda x: x + 1), "offsets"),
    "a shape of floats": ("sparse-bitmask", put("shape", lambda x: x.float()), "whole numbers"),
    "a huge shape": ("sparse-bitmask", put("shape", lambda x: x * 10**9), "the bitmask is"),
    "a negative shape": ("sparse-bitmask", put("shape", lambda x: -x), "for the shape"),
    "bits set anywhere": ("sparse-24-bitmask", put("bitmask", lambda x: x | 255), "keeps"),
    "no words": ("pack int4 groups", drop("weight_packed"), "scales without a weight"),
    "no size": ("pack int4 groups", drop("weight_shape"), "no weight_shape"),
    "another size": ("pack int4 groups", put("weight_shape", lambda x: x * 2), "do not hold"),
    "no scales": ("pack int4 groups", drop("weight_scale"), "no weight_scale"),
    "scales of integers": ("int8 channels", put("weight_scale", lambda x: x.int()), "scales are"),
    "odd scales": ("int8 channels", put("weight_scale", lambda x: x[:7]), "do not divide"),
    "odd zero points": (
        "int8 zero points", put("weight_zero_point", lambda x: x[:7]), "zero points",
    ),
    "a float with a scale": ("int8 channels", put("weight", lambda x: x.bfloat16()), "has a scale"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_parts_that_contradict_each_other_are_refused(fault: str, tmp_path: Path) -> None:
    case, breaks, said = BROKEN[fault]
    parts, described = golden(case)
    breaks(parts)
    with pytest.raises(CheckpointError, match=said) as raised:
        read(tmp_path, parts, described["config"]).read("layer.weight")
    assert raised.value.where
    assert "layer" in raised.value.where


def test_groups_out_of_range_are_refused(tmp_path: Path) -> None:
    parts = {
        "weight": torch.ones(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2, 2),
        "weight_g_idx": torch.tensor([0, 1, 2, 0], dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="one of 2"):
        read(tmp_path, parts, {"quant_method": "compressed-tensors"}).read("layer.weight")


def test_what_a_plain_model_cannot_express_is_refused(tmp_path: Path) -> None:
    parts, described = golden("int8 channels")
    with pytest.raises(ArchitectureError, match="rotates its activations"):
        read(tmp_path / "a", parts, {**described["config"], "transform_config": {"r1": {}}})
    parts["scale_packed"] = torch.ones(1)
    with pytest.raises(ArchitectureError, match="marlin-24"):
        read(tmp_path / "b", parts, described["config"])


def test_a_weight_and_its_parts_at_once_are_refused(tmp_path: Path) -> None:
    parts, described = golden("sparse-bitmask")
    parts["weight"] = torch.ones(64, 128)
    with pytest.raises(CheckpointError, match="bitmask"):
        read(tmp_path, parts, described["config"])


def spoiled(tensor: Tensor, random: torch.Generator) -> Tensor:
    """A part as a hostile file might have it: other numbers, another shape, another dtype."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=random))

    kind = draw(6)
    if kind == 0:
        return tensor.reshape(-1)[: draw(tensor.numel() + 1)].clone()
    if kind == 1:
        return tensor.unsqueeze(draw(tensor.ndim + 1))
    if kind == 2:
        dtypes = [torch.int8, torch.int64, torch.float32, torch.uint8, torch.bool, torch.int16]
        return tensor.to(torch.float32).to(dtypes[draw(6)])
    if kind == 3:
        return torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(3)
    changed = tensor.clone().reshape(-1).view(torch.uint8)
    for _ in range(1 + draw(4)):
        changed[draw(len(changed))] = draw(256)
    return changed.view(tensor.dtype).view(tensor.shape)


def test_hostile_parts_end_in_an_error_of_ours_or_in_numbers(tmp_path: Path) -> None:
    random, refused, read_anyway = torch.Generator().manual_seed(0), 0, 0
    for turn in range(300):
        case = CASES[turn % len(CASES)]
        parts, described = golden(case)
        names = sorted(parts)
        name = names[int(torch.randint(len(names), (), generator=random))]
        parts[name] = spoiled(parts[name], random)
        try:
            weight = read(tmp_path, parts, described["config"]).read("layer.weight")
        except SecateurError:
            refused += 1
        else:
            assert weight.isfinite().all()
            read_anyway += 1
    assert refused > 100
    assert read_anyway > 20  # another number in a weight cannot be told from the right one
