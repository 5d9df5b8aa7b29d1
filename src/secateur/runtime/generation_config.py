"""Sampling options that come with a model, in `generation_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, RecipeError
from secateur.models.header import parse_json
from secateur.runtime.sampling import Sampling

FILE = "generation_config.json"

DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""They count where `do_sample` is true, as in transformers."""

ALWAYS = ("repetition_penalty",)


def generation_config(folder: Path) -> Any:
    """Transformers' own object for the file; None without a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not (folder / FILE).is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its checks raise many kinds of errors
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise unreadable(folder / FILE, said[0]) from None


def sampling_in(folder: Path) -> dict[str, Any]:
    """The options of `Sampling` that a model's folder sets.

    Temperature, top-k, top-p and min-p are taken where `do_sample` is true. A model that samples
    without naming a temperature has temperature 1. `top_k` 0 means all tokens.

    Raises:
        CheckpointError: the file is not JSON, or holds a value that makes no sense.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        stored = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(file, str(error)) from None
    if not isinstance(stored, dict):
        raise unreadable(file, "it is no JSON object")
    samples = stored.get("do_sample") is True
    names = (*(DRAWING if samples else ()), *ALWAYS)
    found = {name: stored[name] for name in names if stored.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise unreadable(file, f"{name} is {value!r}")
    if samples:
        found.setdefault("temperature", 1.0)
    if found.get("top_k", 1) == 0:
        del found["top_k"]
    try:
        Sampling(**found)
    except RecipeError as error:
        raise unreadable(file, error.what) from None
    return {name: value for name, value in found.items() if value != getattr(Sampling, name)}


def sampling_with(defaults: dict[str, Any], given: dict[str, Any]) -> Sampling:
    """Sampling by the options that were given, and else by those of the model.

    Args:
        defaults: from `sampling_in`.
        given: by name; None is not given. `top_k` 0 means all tokens.

    Raises:
        RecipeError: a number is out of range.
    """
    options = defaults | {name: value for name, value in given.items() if value is not None}
    if options.get("top_k") == 0:
        options["top_k"] = None
    return Sampling(**options)


def unreadable(file: Path, why: str) -> CheckpointError:
    """The error for a file that cannot be used."""
    return CheckpointError(
        f"the generation settings cannot be used: {why}",
        where=str(file),
        remedy="correct or delete the file; it only sets defaults",
    )
