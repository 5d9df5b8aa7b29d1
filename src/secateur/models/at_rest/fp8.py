"""Float8 with one scale for each block of a matrix: DeepSeek V3, Qwen3-FP8, MiniMax-M2, Mistral.

weight            float8_e4m3fn [out, in]; experts of a layer together: [experts, out, in]
weight_scale_inv  float32, bfloat16 or float8_e8m0fnu [⌈out / 128⌉, ⌈in / 128⌉]; or one number.
                  In uint8, e means 2^(e − 127). It is the scale itself, in spite of its name

W[i, j] = weight[i, j] · weight_scale_inv[⌊i / 128⌋, ⌊j / 128⌋]

Experts of DeepSeek V4 are MXFP4 beside it: int8 [out, in / 2] holds two codes of e2m1 in a byte,
the first in its low four bits, and a scale is for 32 numbers of a row.

The product is computed in float32 and rounded to the model's dtype, as in `weight_dequant` of
DeepSeek V3 (github.com/deepseek-ai/DeepSeek-V3, inference/kernel.py) and in transformers'
`Fp8Dequantize`. The last block of rows or columns may be shorter. `weight_block_size` of the
configuration gives the size of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.models import at_rest
from secateur.models.at_rest.mxfp4 import GROUP, microscaled
from secateur.models.checkpoint import TensorEntry

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of float8_e4m3fn."""
SCALES = ("{}_scale_inv", "{owner}.scale", "{owner}.qscale_weight")
"""The names of the scales of a tensor: of most, of DeepSeek V4, of Mistral Large."""
OF_ACTIVATIONS = (
    "activation_scale", "input_scale", "qscale_act", "k_scale", "v_scale", "q_scale",
    "gate_up_proj_activation_scale", "down_proj_activation_scale",
)  # fmt: skip


class BlockFloat8(at_rest.NamedForm):
    """`quant_method: fp8`."""

    name: ClassVar[str] = "fp8"
    of_activations: ClassVar[tuple[str, ...]] = OF_ACTIVATIONS

    def assemblies(
        self, source: at_rest.SourceFolder, described: at_rest.Described
    ) -> dict[str, at_rest.Assembly]:
        """Refuses matrices without scales."""
        entries, block = source.reader.entries, _block_of(described, source)
        made = {}
        for name, entry in entries.items():
            scale = _scale_of(name, entries)
            if entry.dtype == FLOAT8 and scale is None:
                raise at_rest.damaged(f"{name} is float8, and there is no scale of it", entry.file)
            if scale is None or scale == name:
                continue
            if entry.dtype in (torch.int8, torch.uint8):
                made[name] = _float4(name, entry, scale, entries[scale], source.dtype)
            if entry.dtype == FLOAT8:
                made[name] = _assembly(name, entry, scale, entries[scale], block, source.dtype)
        at_rest.refuse_empty(made, self.name, source)
        return made

    def notes(self, described: at_rest.Described) -> tuple[str, ...]:
        """Whether the source rounds activations."""
        said = "the source rounds activations to float8 as well; the result does not"
        return (said,) if described.get("activation_scheme") else ()


def _block_of(described: at_rest.Described, source: at_rest.SourceFolder) -> tuple[int, int] | None:
    """The rows and columns of a block; None for one scale for each matrix."""
    found = described.get("weight_block_size", (128, 128))
    if found is None:
        return None
    pair = isinstance(found, (list, tuple)) and len(found) == 2
    if not pair or any(type(size) is not int or size < 1 for size in found):
        raise at_rest.damaged(
            f"weight_block_size is {str(found)[:40]}", source.folder / "config.json"
        )
    return found[0], found[1]


def _scale_of(name: str, entries: Mapping[str, TensorEntry]) -> str | None:
    """The name of the scales of a tensor, if there are any."""
    owner = name.removesuffix(".weight")
    patterns = SCALES if owner != name else SCALES[:1]
    names = (pattern.format(name, owner=owner) for pattern in patterns)
    return next((found for found in names if found in entries), None)


def _assembly(
    name: str,
    entry: TensorEntry,
    scale_name: str,
    scale: TensorEntry,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
) -> at_rest.Assembly:
    """The matrix, or the stacked matrices, that a tensor and its scales make."""
    if len(entry.shape) not in (2, 3):
        raise at_rest.damaged(f"a tensor of shape {list(entry.shape)} has scales", name)
    exponents = scale.dtype == torch.uint8
    if not scale.dtype.is_floating_point and not exponents:
        raise at_rest.damaged(f"the scales are {scale.dtype}", scale_name)
    sizes = _fitting_blocks(entry.shape, scale.shape, block)
    if sizes is None:
        raise at_rest.damaged(
            f"the scales are {list(scale.shape)}; {list(entry.shape)} in blocks of "
            f"{list(block) if block else 'any size'} needs others",
            scale_name,
        )
    return at_rest.Assembly(
        {"weight": name, "scale": scale_name},
        entry.shape,
        dtype,
        "float8 in blocks" if block else "float8",
        partial(_multiplied, block=sizes),
        partial(_rounded_back, block=sizes, dtype=dtype),
        stacked=len(entry.shape) == 3 and len(scale.shape) == 3,
    )


def _float4(
    name: str, entry: TensorEntry, scale_name: str, scale: TensorEntry, dtype: torch.dtype
) -> at_rest.Assembly:
    """The matrix of 4-bit numbers."""
    shape = (*entry.shape[:-1], 2 * entry.shape[-1]) if entry.shape else ()
    fits = len(shape) == 2 and scale.shape == (shape[0], shape[1] // GROUP)
    if not fits or scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise at_rest.damaged(
            f"{list(entry.shape)} bytes of 4-bit numbers with scales {list(scale.shape)} of "
            f"{scale.dtype}: MXFP4 has a power of two for {GROUP} numbers of a row",
            scale_name,
        )
    parts = {"blocks": name, "scales": scale_name}
    return at_rest.Assembly(parts, shape, dtype, "float4", microscaled)


def _fitting_blocks(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The size of a block for which these scales belong to a tensor; None if there is none."""
    rows, columns = shape[-2:]
    # one number is the scale of everything, also of stacked experts
    if torch.Size(scales).numel() == 1:
        return rows, columns
    if len(scales) != len(shape) or scales[:-2] != shape[:-2] or 0 in scales:
        return None
    if block is not None and scales[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if rows % scales[-2] or columns % scales[-1]:
        return None
    return rows // scales[-2], columns // scales[-1]


def _scales(parts: at_rest.Parts, block: tuple[int, int]) -> Tensor:
    """The scales in the shape of the tensor, float32."""
    scale = parts["scale"]
    scale = at_rest.powers_of_two(scale) if scale.dtype == torch.uint8 else scale
    return at_rest.spread_blocks(scale.to(torch.float32), tuple(parts["weight"].shape), block)


def _multiplied(parts: at_rest.Parts, block: tuple[int, int]) -> Tensor:
    """The dense tensor, float32."""
    return parts["weight"].to(torch.float32) * _scales(parts, block)


def _rounded_back(
    values: Tensor, parts: at_rest.Parts, block: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parts for new values: the scales stay, and so does every number that did not change.

    A number is rounded to the nearest one of its block's grid, from −448 to 448 times the scale.
    """
    # 0 / scale would be NaN where the scale is 0
    wanted = torch.where(values == 0, 0.0, values.to(torch.float32) / _scales(parts, block))
    codes = wanted.clamp(-LARGEST, LARGEST).to(FLOAT8).view(torch.uint8)
    same = _multiplied(parts, block).to(dtype) == values
    # compared as the model reads them, so a number that did not change keeps its byte
    codes = torch.where(same & (values != 0), parts["weight"].view(torch.uint8), codes)
    return {"weight": codes.view(FLOAT8), "scale": parts["scale"]}


at_rest.stored_forms.register(BlockFloat8.name)(BlockFloat8())
