"""What a converted checkpoint takes over from its source besides the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, MemoryBudgetError, RecipeError
from secateur.models.checkpoint import INDEX_NAMES, copied_files, disk_error
from secateur.models.header import parse_json

__all__ = [
    "RUN_FOLDER",
    "carry_over",
    "check_free",
    "check_output",
    "read_config",
    "refuse_quantized",
]

RUN_FOLDER = "secateur"
"""Where recipe, manifest and records of a pruning run lie within a model's folder."""


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checked folder."""
    config: dict[str, Any] = parse_json((folder / "config.json").read_bytes())
    return config


def refuse_quantized(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not plain numbers.

    Raises:
        CheckpointError: it is quantized, or compressed already.
    """
    told = read_config(folder).get("quantization_config")
    if told is None:
        return
    method = told.get("quant_method") if isinstance(told, dict) else told
    if method == "secateur":
        raise CheckpointError(
            "the checkpoint is compressed already",
            where=str(folder),
            remedy="run `secateur decompress DIR --output DENSE` and name that",
        )
    raise CheckpointError(
        f"the checkpoint is quantized ({method})",
        where=str(folder),
        remedy="name the checkpoint in float32, bfloat16 or float16 it was made from",
    )


def carry_over(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy tokenizer, licence and the records of the pruning run; write the configuration.

    Args:
        source: a checkpoint.
        target: the folder of the new one.
        config: its configuration.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    try:
        for file in copied_files(source):
            if file.name not in ("config.json", *INDEX_NAMES):
                shutil.copyfile(file, target / file.name)
        if (source / RUN_FOLDER).is_dir():
            shutil.copytree(source / RUN_FOLDER, target / RUN_FOLDER)
        (target / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise disk_error(error, target) from error


def check_output(source: Path, output: Path) -> None:
    """Refuse to write a model over the one it is made from.

    Raises:
        RecipeError: both are the same folder.
    """
    if output.exists() and output.resolve() == source.resolve():
        raise RecipeError(
            "the output is the source itself", where=str(output), remedy="choose another --output"
        )


def check_free(needed_bytes: int, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        MemoryBudgetError: naming both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise MemoryBudgetError(
            f"the result needs {needed_bytes / 2**30:.2f} GiB of disk, {free / 2**30:.2f} are free",
            where=str(folder),
            remedy="free some space, or choose another --output",
        )
