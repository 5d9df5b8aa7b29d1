"""The recipe of `secateur export`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.recipes.run import OutputFolder, Overwriting
from secateur.recipes.section import WHAT, Flag, Recipe, Section


class WhatToExport(Section):
    """The model, and what it becomes."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Folder (compressed or not), hub id, GGUF file or named sample."
    )
    to: Annotated[
        Literal["gguf", "compressed-tensors", "onnx", "openvino", "semi-structured"],
        Flag(value="TARGET"),
    ] = Field(
        "gguf", description="The target: gguf, compressed-tensors, onnx, openvino, semi-structured."
    )
    type: Annotated[str | None, Flag(default="the first that the target names")] = Field(
        None,
        description="How matrices are stored. gguf: q8_0, f16, bf16, f32, q5_0, q4_0, stored (as "
        "the folder has them), and with the extra llamacpp q6_k, q3_k, and q5_k_m, q4_k_m, q3_k_m, "
        "q2_k, which lose exact zeros. compressed-tensors: w8a8, w4a16, w8a16. onnx: fp32, int8, "
        "int4. openvino: q8_0, f16, q4_0. semi-structured: bf16, f16.",
    )
    keep_zeros: bool = Field(False, description="Refuse a type that loses exact zeros.")


class ExportRecipe(WhatToExport, OutputFolder, Recipe):
    """One export."""

    run: ClassVar[type[Section] | None] = Overwriting
