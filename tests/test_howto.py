"""The commands of the how-to pages run, and leave what the pages say, on tiny models.

A page's `bash` and `python` blocks are run in their order in one folder. Blocks without a language
are shown only: they need a GPU, another engine, several machines or more time. `MODEL` is a tiny
model, `TEXT` a file, and the runs are made short.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import secateur as package
from commands import Outcome
from gguf_models import byte_level
from secateur.models.skeleton import quiet_transformers
from slow import slow_but
from tiny import save_tiny
from trained import source_text

DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "howto"
COMING = "../directory/coming-from"
IN_PROCESS = (
    "fit-memory",
    "speed-up-cpu",
    "gpu-2-4",
    "cut-and-heal",
    "prune-experts",
    "lora",
    "serve",
)
AS_PROGRAMS = ("several-machines", "add-a-method")
CALIBRATED = {"--windows": "4", "--sequence-length": "32"}
TRAINED = {
    "--steps": "2",
    "--windows": "24",
    "--sequence-length": "32",
    "--validation-windows": "2",
}
SHORT = {
    "prune": CALIBRATED,
    "structure": CALIBRATED,
    "compress": CALIBRATED,
    "distill": TRAINED,
    "retrain": TRAINED,
    "evaluate": CALIBRATED,
    "diagnose": CALIBRATED,
    "bench": {
        "--contenders": "packed",
        "--rounds": "2",
        "--prompt-tokens": "4",
        "--new-tokens": "2",
        "--seconds": "1",
    },
}


class Block(NamedTuple):
    """A piece of a page that is run."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page that name their language."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block, made short."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield shortened(words)


def shortened(words: list[str]) -> list[str]:
    """A command with few and short windows, and few steps instead of minutes."""
    words = ["TEXT.txt" if word == "TEXT" else word for word in words]
    verb = words[words.index("secateur") + 1]
    if "--minutes" in words:
        place = words.index("--minutes")
        words = words[:place] + words[place + 2 :]
    options = SHORT.get(verb, {})
    if verb == "compress" and "--calibration" not in words:
        options = {}
    for name, text in options.items():
        if name in words:
            words[words.index(name) + 1] = text
        else:
            words += [name, text]
    return words


def promised(page: str) -> list[str]:
    """The files that a page says are there at its end."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    rows = text.partition("## What lies where")[2]
    return [
        path
        for row in re.findall(r"^\| (`.*?) \|", rows, re.M)
        for path in re.findall(r"`([^`]+)`", row)
    ]


@pytest.fixture
def folder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is walked through: a tiny model and a text."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level()
    sizes = {"hidden_size": 64, "vocab_size": len(tokenizer), "tie_word_embeddings": False}
    if page == "prune-experts":
        sizes |= {"intermediate_size": 32}
    else:
        sizes |= {"intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    family = "mixtral" if page == "prune-experts" else "llama"
    save_tiny(Path("MODEL"), family, tokenizer=False, **sizes)
    with quiet_transformers():
        tokenizer.save_pretrained("MODEL")
    Path("TEXT.txt").write_text(source_text()[:40_000], encoding="utf-8")
    return tmp_path


def is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft's own call
@pytest.mark.parametrize(
    "page", slow_but({"fit-memory", "cut-and-heal", "lora"}, (*IN_PROCESS, COMING))
)
def test_a_page_does_what_it_says(
    page: str, folder: Path, secateur: Callable[..., Outcome]
) -> None:
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"{page}.md", "exec"), {})
            continue
        for words in commands(block):
            assert words[0] == "secateur"
            ended = secateur(*words[1:])
            assert ended.code == 0, f"{shlex.join(words)}\n{ended.out}\n{ended.err}"
    assert [path for path in promised(page) if not is_filled(folder / path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", AS_PROGRAMS)
def test_a_page_does_what_it_says_in_programs_of_their_own(page: str, folder: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(package.__file__).parents[1]), str(folder)]),
        "OMP_NUM_THREADS": "1",
    }
    for block in blocks(page):
        if block.language in ("python", "toml"):
            file = folder / block.text.partition("\n")[0].removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
            if block.language == "toml":
                install(folder, block.text)
            continue
        for words in commands(block):
            launcher = {"secateur": ["-m"], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
            rest = words if words[0] == "secateur" else words[1:]
            ended = subprocess.run(
                [sys.executable, *launcher, *rest],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout}\n{ended.stderr}"
    assert [path for path in promised(page) if not is_filled(folder / path)] == []


def install(folder: Path, project: str) -> None:
    """What `pip install .` leaves: the entry points beside the package."""
    points = project.partition('[project.entry-points."')[2].partition("\n\n")[0]
    group, _, lines = points.partition('"]\n')
    target = folder / "energy-1.0.dist-info"
    target.mkdir()
    (target / "METADATA").write_text("Metadata-Version: 2.1\nName: energy\nVersion: 1.0\n")
    (target / "entry_points.txt").write_text(f"[{group}]\n" + lines.replace('"', "") + "\n")


def test_every_page_is_walked_through() -> None:
    assert sorted(IN_PROCESS + AS_PROGRAMS) == sorted(page.stem for page in PAGES.glob("*.md"))
    for page in IN_PROCESS + AS_PROGRAMS:
        assert blocks(page)
        assert promised(page), page
