"""The end of a command's output: where the files are, and which commands to try next."""

from __future__ import annotations

import shlex
from pathlib import Path

from secateur.reporting.tables import Block, next_steps

__all__ = ["after_a_dense_folder", "after_a_fit", "after_a_packed_folder", "after_a_sweep"]


def after_a_dense_folder(folder: Path, dense: str | None) -> list[Block]:
    """The next steps for a model that stores its zeros: pruned, cut or trained.

    Args:
        folder: folder of the model.
        dense: the model to compare it with, if it is known.
    """
    place = shlex.quote(str(folder))
    beside = f" --dense {shlex.quote(dense)}" if dense else ""
    small = shlex.quote(f"{folder}-int8")
    return next_steps(
        {"the model": folder, "its card": folder / "README.md"},
        {
            "measure what it lost": f"secateur evaluate {place}{beside}",
            "store it without its zeros": f"secateur compress {place} --values int8 "
            f"--output {small}",
            "let it write": f"secateur generate {place} --prompt 'The capital of France is'",
        },
    )


def after_a_packed_folder(folder: Path, dense: str | None) -> list[Block]:
    """The next steps for a model without its zeros.

    Args:
        folder: folder of the model.
        dense: the model to compare it with, if it is known.
    """
    place = shlex.quote(str(folder))
    beside = f" --dense {shlex.quote(dense)}" if dense else ""
    return next_steps(
        {"the packed model": folder, "its card": folder / "README.md"},
        {
            "let it write": f"secateur generate {place} --prompt 'The capital of France is'",
            "measure speed and memory": f"secateur bench {place}",
            "measure what it lost": f"secateur evaluate {place}{beside}",
        },
    )


def after_a_fit(folder: Path) -> list[Block]:
    """The next steps after a fit.

    Args:
        folder: folder of the packed winner.
    """
    place = shlex.quote(str(folder))
    return next_steps(
        {
            "the packed model": folder,
            "every candidate": folder / "secateur" / "fit.json",
            "the plot": folder / "secateur" / "frontier.png",
            "the recipe": folder / "secateur" / "recipe.yaml",
        },
        {
            "talk to it": f"secateur chat {place}",
            "serve it": f"secateur serve {place}",
            "publish it": f"secateur push {place} OWNER/NAME",
            "give it to another engine": f"secateur export {place} --to gguf --output DIR",
            "make it again": f"secateur chain {place}/secateur/recipe.yaml",
        },
    )


def after_a_sweep(folder: Path, model: str) -> list[Block]:
    """The next steps after a sweep.

    Args:
        folder: folder of the sweep.
        model: the dense model.
    """
    return next_steps(
        {"the curves": folder / "sweep.png", "the table": folder / "sweep.md"},
        {
            "prune at the point you choose": f"secateur prune {shlex.quote(model)} --method NAME "
            "--sparsity 0.5 --output DIR",
        },
    )
