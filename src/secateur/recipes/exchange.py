"""The recipes of the verbs that give and take models: `export`, `import` and `push`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from secateur.recipes.options import OUTPUT, WHAT, Flag, Recipe, Section, matching
from secateur.recipes.shared import OutputFolder, Overwriting, RemoteCode


class ExportRecipe(OutputFolder, Recipe):
    """One export."""

    group = WHAT
    run = Overwriting

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


class WhatToImport(Section):
    """The model, and what is put on it."""

    group = WHAT

    model: Annotated[str, Flag(value="SOURCE")] = Field(
        description="Folder or hub id of a model with zeros: plain safetensors, "
        "compressed-tensors, or torch.nn.utils.prune; a dense model with --masks."
    )
    masks: Annotated[str | None, Flag(value="FILE", default="none")] = Field(
        None,
        description="Safetensors file of masks by the names of tensors, True = kept. They are "
        "applied to the model.",
    )
    adapter: Annotated[str | None, Flag(value="DIR", default="none")] = Field(
        None,
        description="Folder of an adapter that peft trained on the model. It is merged, and the "
        "zeros of the model stay zero.",
    )


class ImportRecipe(RemoteCode, WhatToImport, OutputFolder, Recipe):
    """One import."""

    run = Overwriting


REPOSITORY = r"[^/\s]+/[^/\s]+"


class HowToPublish(Section):
    """Who may see it, and where it goes."""

    group = OUTPUT

    public: bool = Field(
        False, description="Make the repository public. Without this it is private."
    )
    branch: Annotated[str | None, Flag(value="NAME", default="main")] = Field(
        None, description="Branch of the repository; it is created if there is none."
    )
    base_model: Annotated[
        str | None,
        Flag(value="REPO", default="the one that the card names"),
        matching(REPOSITORY, "OWNER/NAME"),
    ] = Field(None, description="Base model for the card, OWNER/NAME on the hub.")
    dry_run: bool = Field(
        False, description="Check everything and show files and card. Nothing is sent."
    )


class PushRecipe(RemoteCode, HowToPublish, Recipe):
    """One upload."""

    group = WHAT

    model: Annotated[str, Flag(value="DIR")] = Field(description="Folder of the model.")
    repo: Annotated[str, Flag(value="REPO"), matching(REPOSITORY, "OWNER/NAME")] = Field(
        description="Repository on the hub, OWNER/NAME. It is created if there is none."
    )
