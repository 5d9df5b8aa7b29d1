"""Loads a whole model into memory, for evaluation or generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.models.classes import auto_class
from secateur.models.configuration import check_sizes, transformers_errors
from secateur.models.skeleton import quiet_transformers, refuse_missing

__all__ = ["load_whole"]


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
    with quiet_transformers(), transformers_errors(folder):
        loaded: Any
        report: dict[str, Any]
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
