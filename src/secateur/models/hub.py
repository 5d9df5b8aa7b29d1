"""Names of models, and the model hub: whether it answers, and its downloads.

Nothing heavy is imported here: a command can refuse a wrong name before it imports torch.

The hub's own client tries for half a minute before it says that there is no network. Here a
connection is tried first, for two seconds; without one, the client reads only its cache.
"""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from secateur.errors import CheckpointError, SourceError, first_line
from secateur.models.samples import MODELS, OwnTexts
from secateur.registry import did_you_mean

CONNECT_SECONDS = 2.0
PORTS = {"http": 80, "https": 443}
WITHOUT_HUB = (
    "name a local folder, a .gguf file or a sample ({samples}); with HF_HUB_OFFLINE=1 the hub's "
    "cache is read and no network is tried"
)
FILES = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "README.md",
]
CONFIGURATION = ["config.json", "LICENSE*", "README.md"]
# Folders inside a repository contain other formats, unless they are modules of an embedding model
# (1_Pooling). "consolidated" files repeat the weights.
IGNORED = ["[!0-9]*/*", "?[!_]*/*", "consolidated*"]


HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
CONVERT = (
    "convert it to safetensors where you trust it: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
)


def why_unreachable(seconds: float = CONNECT_SECONDS) -> str | None:
    """Why no connection to the hub can be made; None if one can.

    Connects to the proxy instead where one is set. A thread looks up the name, because the
    system's resolver takes no time limit.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    proxies, name = urllib.request.getproxies(), address.hostname or ""
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(name):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    place = (address.hostname or "", address.port or PORTS.get(address.scheme, 80))
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection(place, seconds).close()
        except OSError as error:
            found.append(f"{place[0]}: {error.strerror or error}")
        else:
            found.append(None)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"{place[0]} did not answer within {seconds:g} seconds"


@contextmanager
def hub_or_cache() -> Iterator[str | None]:
    """Within this context the hub's client uses the network only if the hub answers.

    Otherwise it reads its cache alone, as with HF_HUB_OFFLINE=1.

    Yields:
        Why the hub does not answer; None if it does.
    """
    reason = why_unreachable()
    if reason is None:
        yield None
        return
    import datasets
    from huggingface_hub import constants

    # each package has read the variable when it was imported
    switches: list[Any] = [constants, datasets.config]
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield reason
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def refuse_out_of_reach(model: str) -> None:
    """Refuse a path that is nothing, and a hub model that cannot be had: it is not in the cache,
    and the hub does not answer.

    Takes two seconds at most and imports nothing heavy, so a command can ask first.
    """
    kind = kind_of_name(model)
    if kind is None and "/" in model:  # without a slash it may be a shape that `advise` knows
        raise no_such_model(model)
    hub = hub_name(model) if kind == "hub" else None
    if hub is None:
        return
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"models--{hub.repo.replace('/', '--')}"
    reason = None if cached.exists() else why_unreachable()
    if reason is not None:
        raise _out_of_reach(hub.repo, reason)


def _out_of_reach(repo: str, reason: str) -> SourceError:
    """That a model is neither in the cache nor to be downloaded."""
    return SourceError(
        f"{repo} is not on this machine, and the hub cannot be reached ({reason})",
        where=f"hub: {repo}",
        remedy=f"check the network; or {WITHOUT_HUB.format(samples=', '.join(MODELS))}",
    )


def download_model(
    repo: str,
    revision: str | None,
    trust_remote_code: bool,
    *,
    weights: bool = True,
) -> Path:
    """The snapshot of a hub model: safetensors, configuration and tokenizer, no pickles.

    Args:
        repo: its id, `org/name`.
        revision: branch, tag or commit; None for the default branch.
        trust_remote_code: also download the Python files.
        weights: False fetches the configuration alone.
    """
    import huggingface_hub
    from huggingface_hub import errors

    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [
            *(FILES if weights else CONFIGURATION),
            *(["*.py"] if trust_remote_code else []),
        ],
        "ignore_patterns": IGNORED,
    }
    reason = why_unreachable()
    try:
        folder = huggingface_hub.snapshot_download(
            repo, local_files_only=reason is not None, **options
        )
    except errors.GatedRepoError:
        what = f"{repo} is gated: you have to accept its owner's terms first"
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
        raise _out_of_reach(repo, reason or first_line(error)) from error
    else:
        if not weights or any(Path(folder).glob("*.safetensors")):
            return Path(folder)
        raise CheckpointError(
            f"{repo} has no safetensors, and pickled weights are not downloaded",
            where=f"hub: {repo}",
            remedy=f"name a revision that has them, or {CONVERT}",
        )
    raise SourceError(what, where=f"hub: {repo}", remedy=remedy)


class HubName(NamedTuple):
    """A model of the hub: its id, and a branch, tag or commit."""

    repo: str
    revision: str | None


def kind_of_name(name: str) -> Literal["folder", "file", "sample", "hub"] | None:
    """What a name means: a path that exists, then a sample, then a hub id; None if nothing.

    Example:
        >>> from secateur.models.hub import kind_of_name
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


def own_texts(name: str) -> OwnTexts | None:
    """The texts of a sample; None for any other model."""
    return MODELS[name].texts if kind_of_name(name) == "sample" else None


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
