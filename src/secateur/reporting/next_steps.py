"""The end of a command's output: where the files are, and which commands to try next.

Every command works from the folder in which it is read, without a model hub. The dense model is
known from the records in the model's folder.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from secateur.calibration.documents import KNOWN_DATASETS
from secateur.models.configuration import DESCRIPTIONS
from secateur.models.hub import kind_of_name
from secateur.models.samples import TEXTS
from secateur.recipes.shared import texts_of
from secateur.reporting.tables import Block, next_steps

HELD_OUT = TEXTS[-1]
"""A text for evaluation that needs no hub."""
OWN_WINDOWS = 40
"""The most windows of a user's own text; the file may be large."""

PROMPT = "The capital of France is"
"""The beginning of a text that people judge at once."""


def command(*words: object) -> str:
    """A command of secateur, quoted for the shell.

    Example:
        >>> from secateur.reporting.next_steps import command
        >>> command("generate", "my model", "--prompt", "Hello")
        "secateur generate 'my model' --prompt Hello"
    """
    return shlex.join(["secateur", *map(str, words)])


def free_place(name: str | Path) -> str:
    """A folder that does not exist: the name, or the name with a number."""
    place, number = str(name), 1
    while os.path.lexists(place):
        number += 1
        place = f"{name}-{number}"
    return place


def _read(file: Path) -> Any:
    """A JSON file; an empty object if it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _notes(folder: Path) -> tuple[Any, Any, Any]:
    """The manifest, the trainings and the compression that the records of a folder tell of."""
    manifest, trainings, packed, imported = (
        _read(folder / "secateur" / f"{name}.json")
        for name in ("manifest", "training", "compression", "import")
    )
    if imported and not imported.get("masks"):
        manifest = {}  # what another tool pruned: its dense model is not known
    return manifest, trainings or [{}], packed


def dense_model(folder: Path) -> str | None:
    """The model before anything was cut, pruned or rounded; None if it is not known, or gone."""
    manifest, trainings, packed = _notes(folder)
    first = trainings[0].get("recipe", {})
    sources = [
        manifest.get("source", {}).get("name"),
        first.get("teacher") or first.get("model"),
        packed.get("source"),
    ]
    known = (name for name in sources if name and kind_of_name(name) is not None)
    return next(known, None)


def _text_words(folder: Path, dense: str | None) -> list[str]:
    """The options of `evaluate` that choose a text which can be read here."""
    manifest, trainings, packed = _notes(folder)
    calibrated = manifest.get("calibration") or packed.get("rounding", {}).get("calibration") or {}
    last = trainings[-1].get("recipe", {})
    watched = last.get("validation_text")
    read = [*texts_of(calibrated.get("source", "")), *last.get("text", ())]
    texts = [text for text in ([watched] if watched else read) if text]
    files = [text for text in texts if not text.endswith(".safetensors")]
    own = [text for text in files if Path(text).expanduser().exists()]
    sample = dense is not None and kind_of_name(dense) == "sample"
    if sample or any(text in TEXTS for text in texts):
        return ["--text", HELD_OUT]
    if own:
        tokens = trainings[-1].get("text", {}).get("sequence_length")
        length = calibrated.get("sequence_length") or tokens
        words = ["--sequence-length", str(length)] if length else []
        return ["--text", own[0], *words, "--windows", str(OWN_WINDOWS)]
    if any(text in KNOWN_DATASETS or text.startswith("hub:") for text in texts):
        return []  # the hub could be read
    return ["--text", HELD_OUT]


def evaluation(folder: Path) -> dict[str, str]:
    """The command that evaluates a model, beside its dense model if that is known."""
    dense = dense_model(folder)
    words = _text_words(folder, dense)
    what = "measure what it lost" if dense else "measure its perplexity"
    if words[1:2] and words[1] != HELD_OUT:
        what += ", on a text that it was made with; one that it never read says more"
    return {what: command("evaluate", folder, *(["--dense", dense] if dense else []), *words)}


def generation(folder: Path) -> dict[str, str]:
    """The command that lets a model write."""
    return {"let it write": command("generate", folder, "--prompt", PROMPT)}


def conversion(folder: Path) -> str:
    """The command that gives a model to llama.cpp."""
    return command("export", folder, "--to", "gguf", "--output", free_place(f"{folder}-gguf"))


def after(folder: Path, zeros: float | None) -> list[Block]:
    """The next steps for a model that a verb has made.

    Args:
        folder: folder of the model.
        zeros: fraction of zeros in the matrices of a model that stores its zeros (pruned, cut,
            trained or imported); None for a packed one.
    """
    kind, writing, measuring = "the model", generation(folder), evaluation(folder)
    commands = measuring | writing
    if zeros is None:
        timing = {"measure speed and memory": command("bench", folder)}
        kind, commands = "the packed model", writing | timing | measuring
    elif _read(folder / "config.json").keys().isdisjoint(DESCRIPTIONS):  # not in fewer bits already
        small = free_place(f"{folder}-int8")
        what = "store it without its zeros" if zeros else "store its weights in 8 bits"
        packing = {what: command("compress", folder, "--values", "int8", "--output", small)}
        commands = measuring | packing | writing
    return next_steps({kind: folder, "its card": folder / "README.md"}, commands)
