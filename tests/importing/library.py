"""Folders as llm-compressor writes them, made by the library compressed-tensors itself.

Only its releases up to 0.12 write the formats for zeros. `python tests/importing/library.py` writes
`golden.safetensors`, which the default tests read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import Tensor

WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
"""Sizes that every format can store; 384 columns are three groups of 128."""

SCHEMES: dict[str, tuple[str, Any, str | None]] = {
    "pack int4 groups": ("pack-quantized", (4, "group", 32, "int", True), None),
    "pack int4 zero points": ("pack-quantized", (4, "group", 32, "int", False), None),
    "pack int8 channels": ("pack-quantized", (8, "channel", None, "int", True), None),
    "int8 channels": ("int-quantized", (8, "channel", None, "int", True), None),
    "int8 zero points": ("int-quantized", (8, "channel", None, "int", False), None),
    "int8 one scale": ("naive-quantized", (8, "tensor", None, "int", True), None),
    "float8 channels": ("float-quantized", (8, "channel", None, "float", True), None),
    "int8 in 2:4": ("int-quantized", (8, "channel", None, "int", True), "sparse-24-bitmask"),
    "float8 in 2:4": ("float-quantized", (8, "channel", None, "float", True), "sparse-24-bitmask"),
    "int8 in a bitmask": ("int-quantized", (8, "channel", None, "int", True), "sparse-bitmask"),
}
"""Format, bits, strategy, group, kind, symmetry, and the format of the zeros around."""

ZEROS = ("sparse-bitmask", "sparse-24-bitmask")
GOLDEN = Path(__file__).with_name("golden.safetensors")
GOLDEN_ROWS, GOLDEN_COLUMNS = 64, 128


def library(needs: str = "compressed_tensors") -> Any:
    """A module of the library, of a release that writes all formats."""
    try:
        release = version("compressed-tensors")
    except PackageNotFoundError:
        release = "none"
    if not release.startswith("0.12."):
        sys.exit(f"needs compressed-tensors 0.12.2, found {release}; later ones write no zeros")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(needs)


def pruned_folder(place: Path) -> Path:
    """A tiny model with random zeros in its linears, 2:4."""
    save_tiny(place, dtype=torch.bfloat16, **WIDE)
    file = place / "model.safetensors"
    tensors = load_file(file)
    random = torch.Generator().manual_seed(5)
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            score = torch.rand(weight.shape, generator=random)
            four = score.view(-1, 4)
            kept = torch.zeros_like(four, dtype=torch.bool)
            kept.scatter_(1, four.topk(2, 1).indices, True)
            tensors[name] = weight.masked_fill(~kept.view(weight.shape), 0.0)
    save_file(tensors, file, metadata={"format": "pt"})
    return place


def scheme_of(bits: int, strategy: str, group: int | None, kind: str, symmetric: bool) -> Any:
    """The library's description of rounded weights."""
    args = library("compressed_tensors.quantization")
    weights = args.QuantizationArgs(
        num_bits=bits, strategy=strategy, group_size=group, type=kind, symmetric=symmetric
    )
    return args.QuantizationScheme(targets=["Linear"], weights=weights)


def scales_for(weight: Tensor, scheme: Any) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a weight, by the library's own formula."""
    utils = library("compressed_tensors.quantization.utils")
    args = scheme.weights
    groups = weight.shape[1] // args.group_size if args.group_size else 1
    shape = (weight.shape[0], groups, -1)
    if args.strategy == "tensor":
        low, high = weight.min().view(1), weight.max().view(1)
    else:
        low, high = weight.reshape(shape).amin(-1), weight.reshape(shape).amax(-1)
    scale, zero = utils.calculate_qparams(low, high, args)
    return scale, zero


def times(integers: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """(q − zero) · scale, exact; scales of [out, groups], or one."""
    spread = [
        x.double() if x.numel() == 1 else x.double().repeat_interleave(
            integers.shape[1] // x.shape[1], 1
        )
        for x in (zero, scale)
    ]  # fmt: skip
    return (integers.double() - spread[0]) * spread[1]


def write_compressed(
    source: Path, place: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> Path:
    """A copy of a folder with other tensors, and what the library says of them in config.json."""
    shutil.copytree(source, place)
    (place / "model.safetensors").unlink()
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", **quantization}
    (place / "config.json").write_text(json.dumps(config, default=str))
    return place


def by_library(
    source: Path, place: Path, format: str, scheme: Any = None, sparse: str | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """A folder that the library compressed, and the weights that it means.

    Args:
        source: a folder of `pruned_folder`.
        place: of the compressed folder.
        format: of the whole, or of the integers.
        scheme: for integers and float8; None for zeros alone.
        sparse: the format of zeros around integers, if there is one.
    """
    compressors = library("compressed_tensors.compressors")
    config = library("compressed_tensors.config")
    state = load_file(source / "model.safetensors")
    linears = [n.removesuffix(".weight") for n in state if n.endswith("proj.weight")]
    meant, quantization = dict(state), {}
    if scheme is not None:
        lifecycle = library("compressed_tensors.quantization.lifecycle.forward")
        stored = torch.float8_e4m3fn if scheme.weights.type == "float" else torch.int8
        for name in linears:
            weight = state[f"{name}.weight"]
            scale, zero = scales_for(weight, scheme)
            state[f"{name}.weight_scale"], state[f"{name}.weight_zero_point"] = scale, zero
            integers = lifecycle.quantize(weight, scale, zero, scheme.weights, dtype=stored)
            if sparse == "sparse-24-bitmask":
                # the library loses −128, whose absolute value int8 cannot hold
                integers = compressors.Sparse24BitMaskTensor.from_dense(integers).decompress()
            meant[f"{name}.weight"] = times(integers, zero, scale).to(weight.dtype)
        compressor = compressors.BaseCompressor.load_from_registry(format)
        state = compressor.compress(state, names_to_scheme=dict.fromkeys(linears, scheme))
        quantization = {
            "format": format,
            "config_groups": {"group_0": scheme.model_dump(mode="json")},
        }
    zeros = sparse or (format if scheme is None else None)
    if zeros is not None:
        structure = "2:4" if "24" in zeros else "unstructured"
        described = config.SparsityCompressionConfig.load_from_registry(
            zeros, format=zeros, sparsity_structure=structure, targets=["Linear"]
        )
        compressor = compressors.BaseCompressor.load_from_registry(zeros, config=described)
        state = compressor.compress(state, compression_targets=set(linears))
        quantization["sparsity_config"] = described.model_dump(mode="json")
    return write_compressed(source, place, state, quantization), meant


def write_golden() -> None:
    """One small matrix in every format, the digest of what it means, and the configuration."""
    parts: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    name = "model.layers.0.mlp.down_proj"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = pruned_folder(place / "source")
        whole = load_file(source / "model.safetensors")
        for case in (*ZEROS, *SCHEMES):
            one = whole[f"{name}.weight"][:GOLDEN_ROWS, :GOLDEN_COLUMNS].contiguous()
            save_file({f"{name}.weight": one}, source / "model.safetensors")
            format, scheme, sparse = SCHEMES.get(case, (case, None, None))
            how = None if scheme is None else scheme_of(*scheme)
            folder, meant = by_library(source, place / case.replace(":", ""), format, how, sparse)
            stored = load_file(folder / "model.safetensors")
            parts |= {f"{case}/{key.removeprefix(name + '.')}": x for key, x in stored.items()}
            config = json.loads((folder / "config.json").read_text())["quantization_config"]
            notes[case] = json.dumps({"digest": digest(meant[f"{name}.weight"]), "config": config})
    save_file(parts, GOLDEN, metadata=notes)


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values of a tensor; both zeros are one value."""
    return hashlib.sha256((tensor.double() + 0.0).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    write_golden()
