"""Files of the repository that scripts write, or check."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def write_or_check(root: Path, texts: Mapping[Path, str], script: str) -> None:
    """Write files, or with `--check` on the command line, end with an error if one differs.

    Args:
        root: of the repository.
        texts: the text of each file, by its path from the root.
        script: that writes them, for the error.
    """
    if "--check" not in sys.argv[1:]:
        for file, text in texts.items():
            (root / file).write_text(text, encoding="utf-8")
        return
    stale = [
        str(file)
        for file, text in texts.items()
        if not (root / file).is_file() or (root / file).read_text(encoding="utf-8") != text
    ]
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python tools/{script}")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """The lines of a table in Markdown, and an empty one."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
