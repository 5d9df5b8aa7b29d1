"""The errors for what llama.cpp would do differently."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import ArchitectureError, CheckpointError


def differs(folder: Path, why: str) -> ArchitectureError:
    """The error for a model that llama.cpp would not compute alike."""
    return ArchitectureError(
        f"llama.cpp would not compute this model like transformers: {why}",
        where=str(folder),
        remedy="export to another target",
    )


def refused(why: str, where: str) -> CheckpointError:
    """The error for a tokenizer that a GGUF file cannot describe."""
    return CheckpointError(
        f"llama.cpp would not tokenize like this model: {why}",
        where=where,
        remedy="export to another target; to try it all the same, use llama.cpp's own converter",
    )
