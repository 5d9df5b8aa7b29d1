"""Experts in 4-bit floating point with a scale for each 32 numbers: gpt-oss.

P_blocks  uint8 [experts, out, groups, 16]; a byte holds two numbers, the first in its low four bits
P_scales  uint8 [experts, out, groups]; e means 2^(e − 127)

A number of four bits is a sign (the highest), two bits of exponent and one of mantissa, e2m1:
0, 0.5, 1, 1.5, 2, 3, 4, 6. With the numbers of a row in order, g = ⌊i / 32⌋ is the group of i:

P[expert, i, o] = e2m1(number i of row o) · 2^(P_scales[expert, o, g] − 127)

So P is [experts, in, out], as transformers' GptOssExperts stores it. Every such number has few
enough bits for bfloat16. The format is MXFP4 of the OCP Microscaling specification 1.0; the order
of the bytes is that of `convert_moe_packed_tensors` in transformers.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.models import at_rest
from secateur.models.checkpoint import TensorEntry

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"


class MicroscaledFloat4(at_rest.NamedForm):
    """`quant_method: mxfp4`."""

    name: ClassVar[str] = "mxfp4"

    def assemblies(
        self, source: at_rest.SourceFolder, described: at_rest.Described
    ) -> dict[str, at_rest.Assembly]:
        """Refuses blocks without scales, and scales without blocks."""
        entries, made = source.reader.entries, {}
        for name in entries:
            for end, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
                stem = name.removesuffix(end)
                if stem != name and stem + other not in entries:
                    raise at_rest.damaged(f"there is {name}, but no {stem + other}", source.folder)
            stem = name.removesuffix(BLOCKS)
            if stem != name:
                scales = entries[stem + SCALES]
                made[stem] = _assembly(stem, entries[name], scales, source.dtype)
        at_rest.refuse_empty(made, self.name, source)
        return made


def _assembly(
    stem: str, blocks: TensorEntry, scales: TensorEntry, dtype: torch.dtype
) -> at_rest.Assembly:
    """The experts that blocks and scales make."""
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise at_rest.damaged(f"blocks of {blocks.dtype}, scales of {scales.dtype}", stem)
    if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, GROUP // 2):
        raise at_rest.damaged(
            f"blocks {list(blocks.shape)} beside scales {list(scales.shape)}", stem
        )
    experts, out, groups, _ = blocks.shape
    return at_rest.Assembly(
        {"blocks": stem + BLOCKS, "scales": stem + SCALES},
        (experts, groups * GROUP, out),
        dtype,
        "mxfp4",
        _expanded,
        partial(_rounded_back, dtype=dtype),
        stacked=True,
    )


def microscaled(parts: at_rest.Parts) -> Tensor:
    """The numbers [..., 32 groups] of rows of blocks, with scales [..., groups], float32."""
    exponents = parts["scales"].view(torch.uint8).to(torch.int32) - 127
    numbers = at_rest.float4(parts["blocks"]).view(*exponents.shape, GROUP)
    return torch.ldexp(numbers, exponents.unsqueeze(-1)).flatten(-2)


def _expanded(parts: at_rest.Parts) -> Tensor:
    """The experts [experts, in, out], float32."""
    return microscaled(parts).transpose(1, 2)  # a row of blocks is a column of the experts


def _rounded_back(values: Tensor, parts: at_rest.Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts for new values: the scales stay, and so does every number that did not change.

    A number is rounded to the nearest one of its group's grid. Of two that are equally near, the
    smaller one is taken.
    """
    scales = parts["scales"]
    rows = values.transpose(1, 2).unflatten(-1, (-1, GROUP)).to(torch.float32)
    wanted = torch.ldexp(rows, (127 - scales.to(torch.int32)).unsqueeze(-1))
    grid = torch.tensor(at_rest.E2M1[:8])
    # between two neighbours of the grid their middle decides; bit 3 is the sign, and no zero has it
    codes = torch.bucketize(wanted.abs().contiguous(), (grid[1:] + grid[:-1]) / 2).to(torch.uint8)
    codes += 8 * ((wanted < 0) & (codes > 0)).to(torch.uint8)
    before = at_rest.unpacked(parts["blocks"], 4).flatten(-2)
    same = _expanded(parts).to(dtype) == values
    kept = same.transpose(1, 2).unflatten(-1, (-1, GROUP)) & (rows != 0)
    pairs = torch.where(kept, before, codes).unflatten(-1, (-1, 2))
    return {"blocks": pairs[..., 0] | (pairs[..., 1] << 4), "scales": scales}


at_rest.stored_forms.register(MicroscaledFloat4.name)(MicroscaledFloat4())
