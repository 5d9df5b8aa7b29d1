"""Loads a whole model into memory, for evaluation or generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.models.classes import auto_class
from secateur.models.configuration import check_sizes, transformers_errors
from secateur.models.opening import computed_dtype, form_of, open_weights
from secateur.models.skeleton import build_skeleton, quiet_transformers, refuse_missing

EXPANDED = ("awq", "fp8", "gptq", "mxfp4")
"""Forms that our reader expands. compressed-tensors may round activations too: its own library does
that while the model runs."""


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
            loaded, report = load_expanded(folder, dtype, trust_remote_code)
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


def load_expanded(
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
