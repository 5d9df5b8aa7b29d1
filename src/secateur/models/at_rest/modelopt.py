"""Folders of NVIDIA's Model-Optimizer: NVFP4, MXFP4, FP8 and MXFP8.

weight          uint8 [out, in / 2], two codes of e2m1 in a byte, the first in its low four bits; or
                float8 [out, in]
weight_scale    of 4-bit numbers float8 [out, in / 16], or bytes e for 2^(e − 127), [out, in / 32];
                of float8 one, [out], or such bytes
weight_scale_2  float32, one number; none: 1

W = number · weight_scale · weight_scale_2

Experts of Llama 4 and gpt-oss are one tensor for a layer, transposed: P uint8 [experts, in / 2,
out] or float8 [experts, in, out], P_weight_scale [experts, in / 16, out] or one number,
P_weight_scale_2. The layout is that of github.com/NVIDIA/Model-Optimizer,
modelopt/torch/export/unified_export_hf.py. Early folders describe the form in
`hf_quant_config.json` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import ArchitectureError
from secateur.models import at_rest
from secateur.models.at_rest import compressed_tensors as shared
from secateur.models.at_rest.fp8 import FLOAT8
from secateur.models.checkpoint import TensorEntry

SCALE = "_weight_scale"
WHILE_IT_RUNS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""Parts that change the inputs of a matrix, or add to its outputs."""


class ModelOptimizerFolder(shared.CompressedTensorsFolder):
    """`quant_method: modelopt`."""

    name: ClassVar[str] = "modelopt"
    aliases: ClassVar[tuple[str, ...]] = ("modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8")
    keys: ClassVar[tuple[str, ...]] = ()
    of_activations: ClassVar[tuple[str, ...]] = (
        *shared.OF_ACTIVATIONS, "gate_up_proj_input_scale", "down_proj_input_scale",
    )  # fmt: skip

    def assemblies(
        self, source: at_rest.SourceFolder, described: at_rest.Described
    ) -> dict[str, at_rest.Assembly]:
        """Refuses AWQ, SVDQuant and integers."""
        entries = source.reader.entries
        for name in entries:
            if name.rpartition(".")[2] in WHILE_IT_RUNS:
                raise ArchitectureError(
                    "the model scales the inputs of this matrix while it runs, or adds to its "
                    "outputs (AWQ, SVDQuant)",
                    where=name,
                    remedy="name the model before this step, or one in NVFP4 or FP8 without it",
                )
        made = super().assemblies(source, described)
        stems = (n.removesuffix(SCALE) for n in entries if n.endswith(SCALE))
        return made | {stem: _stacked(stem, entries, source.dtype) for stem in stems}


def _stacked(stem: str, entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> at_rest.Assembly:
    """The experts [experts, in, out] of a layer."""
    names = {"weight": stem, "weight_scale": stem + SCALE, "weight_scale_2": f"{stem}{SCALE}_2"}
    parts = {role: name for role, name in names.items() if name in entries}
    found, scale = entries.get(stem), entries[stem + SCALE]
    if found is None or len(found.shape) != 3 or found.dtype not in (torch.uint8, FLOAT8):
        stored = "no" if found is None else f"{found.dtype} {list(found.shape)}"
        raise at_rest.damaged(f"scales of experts beside {stored} weights", stem + SCALE)
    experts, rows, columns = found.shape
    if found.dtype == torch.uint8:
        of_each = replace(scale, shape=scale.shape[:0:-1])  # as of a matrix [out, in]
        shared.check_groups((columns, rows), of_each, stem)
        rows *= 2
    elif torch.Size(scale.shape).numel() != 1:
        raise at_rest.damaged(f"experts in float8 with scales {list(scale.shape)}", stem + SCALE)
    stored_as = "float4" if found.dtype == torch.uint8 else "float8"
    return at_rest.Assembly(
        parts, (experts, rows, columns), dtype, stored_as, _transposed, stacked=True
    )


def _transposed(parts: at_rest.Parts) -> Tensor:
    """One expert [1, in, out], float64."""
    own = {role: part[0].t() if part.ndim == 3 else part for role, part in parts.items()}
    return shared.multiplied(own).t().unsqueeze(0)


at_rest.stored_forms.register(ModelOptimizerFolder.name)(ModelOptimizerFolder())
