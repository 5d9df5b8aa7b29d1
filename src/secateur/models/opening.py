"""Opens the weights of a folder as dense tensors, in whatever form they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.errors import CheckpointError
from secateur.models.at_rest import SourceFolder, described_by, stored_forms
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import read_configuration
from secateur.models.folder_checks import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DENSE = "name the checkpoint in float32, bfloat16 or float16 it was made from"
LOADED = (
    "; or load it with transformers where its library runs, call model.dequantize(), and save it "
    "with save_pretrained"
)
REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(("bitsandbytes", "hqq", "quanto", "eetq", "aqlm", "vptq"), DENSE + LOADED),
    "gguf": "name the .gguf file itself",
    "modelopt": DENSE + ": nvfp4 and Model-Optimizer's other forms are not read",
}
"""What to do about forms that are not read."""


def refuse_quantized(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not plain numbers.

    Raises:
        CheckpointError: it is quantized, or compressed already.
    """
    method = method_of(read_config(folder))
    if method is None:
        return
    if method == "secateur":
        raise CheckpointError(
            "the checkpoint is compressed already",
            where=str(folder),
            remedy="run `secateur decompress DIR --output DENSE` and name that",
        )
    raise CheckpointError(
        f"the checkpoint is quantized ({method})",
        where=str(folder),
        remedy="run `secateur import DIR --output DENSE` and name that"
        if method in stored_forms
        else without(method),
    )


def method_of(config: Mapping[str, Any]) -> str | None:
    """What a configuration calls the form of its weights; None if it names none."""
    told = config.get("quantization_config")
    if told is not None and not isinstance(told, dict):
        return str(told)
    described = described_by(config)
    return str(described.get("quant_method", "compressed-tensors")) if described else None


def without(method: str) -> str:
    """What to do with a form that is not read."""
    return REMEDIES.get(method, DENSE)


def form_of(folder: Path) -> str | None:
    """The name of the form in which the weights of a folder are stored; None for plain tensors."""
    method = method_of(read_config(folder))
    return "compressed-tensors" if method == "sparseml" else method


def formats_of(source: Path, result: Path) -> dict[str, str] | None:
    """How the weights of two folders are stored; None if the source stores plain numbers."""
    form = form_of(source)
    if form is None:
        return None
    dense = str(computed_dtype(result)).removeprefix("torch.")
    return {"source": form, "result": form_of(result) or dense}


def open_weights(folder: Path) -> CheckpointReader:
    """A reader of the dense tensors of a folder, in whatever form they are stored.

    Raises:
        CheckpointError: a file is damaged or missing, or the form is not read.
        ArchitectureError: the source needs what a plain model cannot express.
    """
    reader = CheckpointReader(folder)
    source = SourceFolder(folder, read_configuration(folder), reader, computed_dtype(folder))
    for name in stored_forms:
        if stored_forms[name].recognises(source):
            return stored_forms[name].open(source)
    refuse_quantized(folder)
    return reader


def computed_dtype(folder: Path) -> torch.dtype:
    """The dtype in the configuration; bfloat16 if it names no supported one."""
    config = read_configuration(folder)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        named = str(part.get("dtype", part.get("torch_dtype")))
        if named in DTYPES:
            return DTYPES[named]
    return torch.bfloat16
