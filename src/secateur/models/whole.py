"""A whole model in memory: to be judged, or to write text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.models.skeleton import quiet_transformers

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
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code
        )
    return loaded.to(device).eval()
