"""Checkpoints whose weights are stored in fewer bits, made from tiny models, and slow oracles.

The oracles go number by number, from the words of the formats' own descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, split_shards
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def describe_as(folder: Path, quantization: dict[str, Any]) -> None:
    """Write a description of the form into the configuration."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": quantization}))


def described(folder: Path) -> dict[str, Any]:
    """The description of the form in the configuration; empty if there is none."""
    found = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    return dict(found)


def text_file(place: Path) -> Path:
    """A text to calibrate on."""
    file = place / "text.txt"
    file.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return file


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def to_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix in float8 and its scales, the largest of a block becoming 448."""
    rows, columns = weight.shape
    scales = torch.ones(ceil(rows / block[0]), ceil(columns / block[1]))
    codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            part = weight[place].float()
            scales[i, j] = part.abs().max().clamp(min=1e-8) / 448
            codes[place] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def from_float8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix, number by number, in bfloat16."""
    made = torch.empty(codes.shape, dtype=torch.bfloat16)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            made[i, j] = codes[i, j].float() * scales[i // block[0], j // block[1]].float()
    return made


def in_float8(
    folder: Path, family: str, block: tuple[int, int] = (16, 16), shards: int = 1, **sizes: Any
) -> Path:
    """A tiny model whose decoder matrices are in float8 with block scales; routers are not."""
    return rounded_to_float8(
        save_tiny(folder, family, dtype=torch.bfloat16, **sizes), block, shards
    )


def rounded_to_float8(folder: Path, block: tuple[int, int] = (16, 16), shards: int = 1) -> Path:
    """Put the matrices of layers of a folder in float8; routers, tables and heads are not."""
    tensors = load_file(folder / "model.safetensors")
    spared = ["lm_head"]
    for name, weight in list(tensors.items()):
        if weight.ndim == 2 and ".layers." in name:
            if name.endswith(("gate.weight", ".head.weight", "embed_tokens.weight")):
                spared.append(name.removesuffix(".weight"))
                continue
            tensors[name], tensors[f"{name}_scale_inv"] = to_float8(weight, block)
    save_in(folder, tensors, shards)
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [*block],
    }
    describe_as(folder, {**quantization, "modules_to_not_convert": spared})
    return folder


def save_in(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write tensors in so many files."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if shards > 1:
        split_shards(folder, shards)


def to_microscaled(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Experts [experts, in, out] as blocks and scales of 4-bit floating point."""
    rows = experts.float().transpose(1, 2).contiguous()
    count, out, columns = rows.shape
    groups = rows.view(count, out, columns // 32, 32)
    exponents = torch.log2(groups.abs().amax(-1).clamp(min=1e-20) / 6).ceil()
    grid = torch.tensor([*E2M1, *(-x for x in E2M1)])
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - grid).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


def from_microscaled(blocks: Tensor, scales: Tensor) -> Tensor:
    """The experts [experts, in, out], number by number, in bfloat16."""
    count, out, groups, _ = blocks.shape
    made = torch.empty(count, groups * 32, out, dtype=torch.bfloat16)
    for e in range(count):
        for o in range(out):
            for i in range(groups * 32):
                byte = int(blocks[e, o, i // 32, (i % 32) // 2])
                code = byte >> 4 if i % 2 else byte & 15
                value = -E2M1[code - 8] if code >= 8 else E2M1[code]
                made[e, i, o] = value * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    return made


def packed_words(integers: Tensor, order: tuple[int, ...], lower: int = 0) -> Tensor:
    """Integers [rows, columns] in int32 words along the columns, in an order of each word's.

    From each word, as one unsigned number of 32 bits, `lower` is taken.
    """
    (rows, columns), count = integers.shape, len(order)
    words = torch.zeros(rows, columns // count, dtype=torch.int64)
    for r in range(rows):
        for c in range(columns // count):
            word = 0
            for field, place in enumerate(order):
                word |= int(integers[r, count * c + place]) << (32 // count * field)
            words[r, c] = (word - lower) % 2**32
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def everywhere(reader: Any, oracle: Callable[[str], Tensor]) -> None:
    """Every made tensor of a reader has the values of an oracle, bit for bit."""
    assert reader.made
    for name in reader.made:
        read = reader.whole(name)
        expected = oracle(name)
        assert read.dtype == expected.dtype
        assert torch.equal(raw(read), raw(expected)), name


def to_float4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as NVFP4 (groups of 16) or MXFP4 (of 32): bytes, scales, that of the matrix."""
    rows, whole = weight.float().unflatten(-1, (-1, group)), torch.tensor(1.0)
    largest = rows.abs().amax(-1).clamp(min=1e-8) / 6
    if group == 16:
        whole = largest.max() / 448
        scales = (largest / whole).to(torch.float8_e4m3fn)
        spread = scales.float() * whole
    else:
        exponents = torch.log2(largest).ceil()
        scales, spread = (exponents + 127).to(torch.uint8), torch.exp2(exponents)
    grid = torch.tensor([*E2M1, *(-x for x in E2M1)])
    codes = (rows / spread[..., None]).unsqueeze(-1).sub(grid).abs().argmin(-1).to(torch.uint8)
    pairs = codes.flatten(-2)
    return pairs[:, 0::2] | (pairs[:, 1::2] << 4), scales, whole


def from_float4(pairs: Tensor, scales: Tensor, whole: float) -> Tensor:
    """The matrix [out, in], number by number, in bfloat16."""
    exponents = scales.dtype == torch.uint8
    made = []
    for row, own in zip(pairs.tolist(), scales.double().tolist(), strict=True):
        factors = [2.0 ** (scale - 127) if exponents else scale for scale in own]
        size = 2 * len(row) // len(own)
        codes = [code for byte in row for code in (byte & 15, byte >> 4)]
        values = [-E2M1[code - 8] if code >= 8 else E2M1[code] for code in codes]
        made.append([value * factors[i // size] * whole for i, value in enumerate(values)])
    return torch.tensor(made, dtype=torch.float64).to(torch.bfloat16)


FLOAT4: dict[str, dict[str, Any]] = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    "modelopt beside": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    "nvfp4-pack-quantized": {"quant_method": "compressed-tensors"},
    "mxfp4-pack-quantized": {"quant_method": "compressed-tensors"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
}
"""How a folder describes experts in 4-bit floating point, one tensor for each matrix."""


def in_float4(folder: Path, form: str, family: str, shards: int = 1, **sizes: Any) -> Path:
    """A tiny mixture with experts in 4-bit floating point; `folder`-dense is its dense twin."""
    save_tiny(folder, family, dtype=torch.bfloat16, **sizes)
    tensors, dense = load_file(folder / "model.safetensors"), dict[str, Tensor]()
    described, group = dict(FLOAT4[form]), 16 if form.startswith(("modelopt", "nv")) else 32
    for name, weight in list(tensors.items()):
        dense[name] = weight
        if ".experts." not in name:
            continue
        stem = tensors.pop(name) is weight and name.removesuffix(".weight")
        pairs, scales, whole = to_float4(weight, group)
        dense[name] = from_float4(pairs, scales, float(whole))
        if form.startswith("modelopt"):
            parts = {"weight": pairs, "weight_scale": scales, "weight_scale_2": whole,
                     "input_scale": torch.tensor(0.5)}  # fmt: skip
        elif form == "fp8":
            exponents = scales.view(torch.float8_e8m0fnu)
            parts = {"weight": pairs.view(torch.int8), "scale": exponents}
        else:
            parts = {"weight_packed": pairs, "weight_scale": scales}
            if form.startswith("nv"):
                parts["weight_global_scale"] = 1 / whole.reshape(1)
                parts["input_global_scale"] = torch.ones(1)
                dense[name] = from_float4(pairs, scales, 1 / float(1 / whole))
        tensors |= {f"{stem}.{role}": part for role, part in parts.items()}
    save_in(folder, tensors, shards)
    if described.get("quant_method") == "compressed-tensors":
        described |= {"format": form, "config_groups": {"group_0": _group(form, group)}}
        described |= {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]}
    if "quant_method" in described:
        describe_as(folder, described)
    else:
        file = {"producer": {"name": "modelopt"}, "quantization": described}
        (folder / "hf_quant_config.json").write_text(json.dumps(file))
    twin = folder.with_name(f"{folder.name}-dense")
    save_tiny(twin, family, dtype=torch.bfloat16, **sizes)
    save_in(twin, dense, 1)
    return folder


def _group(form: str, size: int) -> dict[str, Any]:
    """A group of matrices, as compressed-tensors describes it."""
    strategy = "tensor_group" if form.startswith("nv") else "group"
    weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
    return {"targets": ["Linear"], "weights": {**weights, "symmetric": True}, "format": form}


FUSED_FLOAT4: dict[str, dict[str, Any]] = {
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head",
        ],
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
}  # fmt: skip
"""How a folder describes experts in 4-bit floating point that are one tensor for a layer."""


def fused_in_float4(folder: Path, form: str = "mxfp4", **sizes: Any) -> Path:
    """A tiny gpt-oss with experts in 4-bit floating point; `folder`-dense is its dense twin."""
    twin = folder.with_name(f"{folder.name}-dense")
    sizes = {"intermediate_size": 32, **sizes}
    for place in (folder, twin):
        save_tiny(place, "gpt_oss", dtype=torch.bfloat16, **sizes)
    tensors = load_file(folder / "model.safetensors")
    dense = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts = tensors.pop(name)
        if form == "mxfp4":
            blocks, scales = to_microscaled(experts)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            dense[name] = from_microscaled(blocks, scales)
            continue
        # one scale for the tensor, as that of the largest of all experts
        count, columns, rows = experts.shape
        pairs, scales, whole = to_float4(experts.transpose(1, 2).flatten(0, 1), 16)
        made = from_float4(pairs, scales, float(whole))
        dense[name] = made.view(count, rows, columns).transpose(1, 2).contiguous()
        apart = {"": pairs, "_weight_scale": scales}
        for end, part in apart.items():
            own = part.view(torch.uint8).view(count, rows, -1).transpose(1, 2).contiguous()
            tensors[name + end] = own.view(part.dtype)
        tensors |= {f"{name}_weight_scale_2": whole, f"{name}_input_scale": torch.tensor(0.5)}
    save_in(folder, tensors, 1)
    save_in(twin, dense, 1)
    describe_as(folder, FUSED_FLOAT4[form])
    return folder
