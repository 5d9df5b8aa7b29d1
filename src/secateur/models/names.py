"""What the name of a model means, found without reading a model.

Nothing heavy is imported here: a command can refuse a wrong name before it imports torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from secateur.errors import SourceError
from secateur.models.samples import MODELS
from secateur.registry import did_you_mean

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
CONVERT = (
    "convert it to safetensors where you trust it: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
)


class HubName(NamedTuple):
    """A model of the hub: its id, and a branch, tag or commit."""

    repo: str
    revision: str | None


def kind_of_name(name: str) -> Literal["folder", "file", "sample", "hub"] | None:
    """What a name means: a path that exists, then a sample, then a hub id; None if nothing.

    Example:
        >>> from secateur.models.names import kind_of_name
        >>> kind_of_name("smollm2-135m"), kind_of_name("org/name@v2"), kind_of_name("./nowhere")
        ('sample', 'hub', None)
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "file"
    if name in MODELS:
        return "sample"
    return "hub" if hub_name(name) is not None else None


def no_such_model(name: str) -> SourceError:
    """The error for a name that is nothing."""
    return SourceError(
        f"{name}: no such file or folder, and no hub id",
        where=str(Path(name).expanduser().absolute()),
        remedy="check the path; a hub id is ORG/NAME; or a sample, "
        f"{did_you_mean(name, [*MODELS])}",
    )


def hub_name(name: str) -> HubName | None:
    """The parts of `org/name[@revision]`; None if it is written in another way."""
    found = HUB_ID.fullmatch(name)
    if found is None or name.endswith((".gguf", ".safetensors", *PICKLES)):
        return None
    return HubName(found["repo"], found["revision"])
