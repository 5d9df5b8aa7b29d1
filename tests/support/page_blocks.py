"""The code blocks of the documentation, and the commands in them.

Every block names its language. `bash` and `python` are run by `test_walked_pages.py`, unless the
line above says why not: `<!-- not run: it needs a GPU -->`, which no reader sees. Of a `bash`
block, the lines of other programs are not run. `text` is a formula, a tree of files, or an output.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"bash", "c", "python", "toml", "yaml", "json", "text"}
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
OTHERS = {
    "git": "benchmarks/newcomer.py clones, with a clock",
    "make": "tests install no packages; tests/steps/test_demo.py runs the demo",
    "pip": "tests install no packages",
    "python": "tests make no environments",
    "python3": "tests make no environments",
    "pytest": "these are the tests",
    "curl": "it needs a server; tests/serving sends such requests",
    "llama-server": "it is not there; tests/exporting gives such files to llama.cpp",
    "vllm": "tests/plugins runs it, where it is installed",
    "secateur serve": "it runs until it is stopped; tests/serving runs it",
}
"""What is not run of a block, and why."""


class Block(NamedTuple):
    """A block of code.

    Attributes:
        language: what stands behind the three backticks.
        text: its lines.
        reason: why it is not run; empty if it is.
    """

    language: str
    text: str
    reason: str


def name_of(page: Path) -> str:
    """A page's path in the repository without its ending."""
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [
        Block(found["language"], found["text"], found["reason"] or "")
        for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def run_blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run."""
    return [
        block
        for block in blocks(page)
        if not block.reason
        and (block.language == "python" or (block.language == "bash" and any(commands(block))))
    ]


def lines(block: Block) -> Iterator[list[str]]:
    """The words of each line of a block, without comments; continued lines are joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command that is run."""
    return (words for words in lines(block) if not other(words))


def other(words: list[str]) -> str:
    """Why a command is not run; empty if it is."""
    program = Path(words[0]).name
    return OTHERS.get(program) or OTHERS.get(f"{program} {words[1]}", "")
