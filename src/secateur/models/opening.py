"""Opens the weights of a folder as dense tensors, in whatever form they are stored.

`load_whole` puts a whole model into memory, for evaluation or generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.errors import CheckpointError
from secateur.models.at_rest import SourceFolder, described_by, stored_forms
from secateur.models.checkpoint import QUANT_METHOD, CheckpointReader
from secateur.models.configuration import (
    check_sizes,
    read_config,
    read_configuration,
    transformers_errors,
)
from secateur.models.skeleton import auto_class, build_skeleton, quiet_transformers, refuse_missing

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


EXPANDED = ("awq", "fp8", "gptq", "mxfp4")
"""Forms that our reader expands. compressed-tensors may round activations too: its own library does
that while the model runs."""


def refuse_quantized(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not plain numbers."""
    method = _method_of(read_config(folder))
    if method is None:
        return
    if method == QUANT_METHOD:
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
        else REMEDIES.get(method, DENSE),
    )


def _method_of(config: Mapping[str, Any]) -> str | None:
    """What a configuration calls the form of its weights; None if it names none."""
    named = config.get("quantization_config")
    if named is not None and not isinstance(named, dict):
        return str(named)
    described = described_by(config)
    return str(described.get("quant_method", "compressed-tensors")) if described else None


def form_of(folder: Path) -> str | None:
    """The name of the form in which the weights of a folder are stored; None for plain tensors."""
    method = _method_of(read_config(folder))
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


def load_whole(
    folder: Path,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint folder with plain transformers, in eval mode.

    Args:
        folder: the checkpoint.
        device: where the model goes.
        dtype: of its parameters; None keeps the stored one.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: the configuration does not fit the weights, or some are missing.
        ArchitectureError: transformers cannot build the model, or it needs its own code.
    """
    from transformers import AutoConfig

    check_sizes(folder)
    loaded: Any
    report: dict[str, Any]
    with quiet_transformers(), transformers_errors(folder):
        if form_of(folder) in EXPANDED:
            loaded, report = _load_expanded(folder, dtype, trust_remote_code)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            loaded, report = auto_class(config).from_pretrained(
                folder,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    # transformers draws missing ones at random, and says so only in its log
    refuse_missing(sorted(report["missing_keys"]), {}, folder)
    loaded = loaded.to(device).eval()
    if getattr(loaded, "hf_quantizer", None) is not None:
        # compressed-tensors expands weights when the whole model is called first; we call its parts
        with torch.no_grad():
            loaded(torch.zeros(1, 1, dtype=torch.long, device=device))
    return loaded


def _load_expanded(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """A model whose weights are stored in fewer bits, with what our reader makes of them."""
    from transformers import GenerationConfig

    reader = open_weights(folder)
    skeleton = build_skeleton(folder, trust_remote_code=trust_remote_code, opened=False)
    for part in (skeleton.config, getattr(skeleton.config, "text_config", None)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
    loaded, report = type(skeleton).from_pretrained(
        None,
        config=skeleton.config,
        state_dict={name: reader.read(name) for name in reader.entries},
        dtype=dtype or computed_dtype(folder),
        output_loading_info=True,
    )
    if (folder / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded, report
