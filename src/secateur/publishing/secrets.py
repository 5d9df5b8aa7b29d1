"""Finds keys, tokens and folders of this machine in texts that are about to be published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from secateur.errors import VerificationError
from secateur.runs.folder import NOTES

KINDS = {
    "token of the hub": r"\bhf_[A-Za-z0-9]{30,}",
    "token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{40,}",
    "key of an API": r"\bsk-[A-Za-z0-9_-]{32,}",
    "key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "token of Slack": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "password in an address": r"\bhttps?://[^/\s:@\"']+:[^/\s:@\"']+@",
}
PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
NAME = r"[^\s/\\\"'`,=|](?:[^/\\\"'`,=|\n]*[^\s/\\\"'`,=|])?"
FOLDERS = re.compile(rf"(?<![^\s\"'`=,])(?:/|[A-Z]:\\+)(?:{NAME}[/\\]+)+(?={NAME})")
"""The folders of an absolute path, up to its last name."""
TEXTS = {".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja", ".py", ""}


class Secret(NamedTuple):
    """Where a secret was found; the secret itself is not kept."""

    file: str
    line: int
    kind: str


def secrets_in(name: str, text: str) -> Iterator[Secret]:
    """Yield the secrets of a text.

    Example:
        >>> from secateur.publishing.secrets import secrets_in
        >>> [*secrets_in("a.yaml", "x: 1\\ntoken: hf_" + "a" * 34)]
        [Secret(file='a.yaml', line=2, kind='token of the hub')]
    """
    for kind, pattern in PATTERNS.items():
        for found in pattern.finditer(text):
            yield Secret(name, text.count("\n", 0, found.start()) + 1, kind)


def texts_of(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield the files that hold text."""
    for name, file in files.items():
        if file.suffix in TEXTS:
            yield name, file.read_text(encoding="utf-8", errors="replace")


def refuse_secrets(files: Mapping[str, Path]) -> None:
    """Refuse files that hold keys or tokens.

    Raises:
        VerificationError: names the file, the line and the kind of each, not the secret.
    """
    found = [secret for name, text in texts_of(files) for secret in secrets_in(name, text)]
    if found:
        raise VerificationError(
            f"{len(found)} secrets would be published: "
            + ", ".join(f"a {secret.kind}" for secret in found[:4]),
            where=", ".join(f"{secret.file}:{secret.line}" for secret in found[:4]),
            remedy="remove them from the files, and revoke them if they were shared before",
        )


def notes_without_folders(files: Mapping[str, Path]) -> dict[str, str]:
    """The texts of the notes that name folders of this machine, with only the last names."""
    notes = {name: file for name, file in files.items() if name.startswith(f"{NOTES}/")}
    texts = {name: (text, without_folders(text)) for name, text in texts_of(notes)}
    return {name: bare for name, (text, bare) in texts.items() if text != bare}


def without_folders(text: str) -> str:
    """A text in which every absolute path is reduced to its last name.

    Folders describe one machine, and often its user. Relative paths and addresses stay.

    Example:
        >>> from secateur.publishing.secrets import without_folders
        >>> without_folders("model: /home/me/my models/tiny")
        'model: tiny'
    """
    return FOLDERS.sub("", text)
