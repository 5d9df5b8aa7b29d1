"""Whether a folder holds a whole model, seen without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.models.checkpoint import read_header, shard_files
from secateur.models.configuration import read_configuration
from secateur.models.header import parse_json


def check_folder(folder: Path) -> None:
    """Check that a folder contains a complete model, without reading its weights.

    The configuration must name a model type, all shards must exist, and the header of each one must
    describe every byte of its file.

    Raises:
        CheckpointError: names what is missing or damaged, with the bytes expected and found.
    """
    check_config(folder)
    read_configuration(folder)
    for shard in shard_files(folder):
        with shard.open("rb") as stream:
            if stream.read(32).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    "this is only a git LFS pointer; the weights were not downloaded",
                    where=str(shard),
                    remedy="run 'git lfs pull' in the folder",
                )
        read_header(shard)


def check_config(folder: Path) -> None:
    """Check that a folder has a configuration."""
    file = folder / "config.json"
    if not file.is_file():
        remedy = "name a folder written by save_pretrained"
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        if (folder / "adapter_config.json").is_file():
            remedy = "this is an adapter: merge it into its base model, then name the merged folder"
        elif ggufs:
            remedy = f"name the GGUF file itself: {folder / ggufs[0]}"
        raise CheckpointError("the folder has no config.json", where=str(folder), remedy=remedy)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checked folder."""
    config: dict[str, Any] = parse_json((folder / "config.json").read_bytes())
    return config
