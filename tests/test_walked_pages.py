"""The code blocks of the documentation run, in their order, on tiny models.

A page is walked in one folder. `MODEL` is a tiny model, `TEXT` a file, and the runs are made short.
What a page takes as given (`PRUNED`, a mask, a trainer's data) is made by `page_givens.py`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import page_givens
import pytest
import yaml
from commands import Outcome
from lm_eval.api.task import TaskConfig
from page_blocks import LANGUAGES, PAGES, ROOT, Block, blocks, commands, name_of, run_blocks
from slow import slow_but

import secateur as package
from secateur.recipes.prune import ChainRecipe, PruneRecipe
from secateur.recipes.reading import build_recipe

HOW_TO = [name_of(page) for page in PAGES if page.parent.name == "howto"]
AS_PROGRAMS = (
    "CONTRIBUTING",
    "docs/howto/several-machines",
    "docs/howto/add-a-method",
    "docs/howto/own-kernel",
)
WALKED = [name_of(page) for page in PAGES if run_blocks(page) and name_of(page) not in AS_PROGRAMS]
BY_DEFAULT = {"docs/start", "docs/howto/prune-experts"}
FAMILIES = {
    "docs/howto/prune-experts": "mixtral",
    "docs/methods/experts": "mixtral",
    "docs/methods/fluctuation": "gpt2",
}
"""The family of `MODEL`, where it is no Llama."""
DATA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "docs/run-folder": partial(build_recipe, PruneRecipe),
    "docs/structure/chain": partial(build_recipe, ChainRecipe),
    "docs/evaluation": lambda task: TaskConfig(**{k: task[k] for k in task if k != "include"}),
}
"""What reads the YAML blocks of a page."""

NAMED = {
    "TEXT": "TEXT.txt",
    "c4": "text.jsonl",
    "wikitext2": "HELD-OUT.txt",
    "boolq-calibration": "TEXT.txt",
    "boolq-held-out": "HELD-OUT.txt",
    "smollm2-135m": "MODEL",
}
"""What stands for the texts and the model that are not on every machine."""
CALIBRATED = {"--calibration": "TEXT.txt", "--windows": "4", "--sequence-length": "32"}
JUDGED = {"--text": "HELD-OUT.txt", "--windows": "4", "--sequence-length": "32"}
TRAINED = {
    "--steps": "2",
    "--windows": "24",
    "--sequence-length": "32",
    "--validation-windows": "2",
}
SHORT = {
    "demo": {"--calibration": "TEXT.txt", "--text": "HELD-OUT.txt", "--text-windows": "2"},
    "prune": CALIBRATED,
    "structure": CALIBRATED,
    "fit": CALIBRATED | {"--heal-tokens": "0"},
    "sweep": CALIBRATED | JUDGED,
    "train": TRAINED,
    "evaluate": JUDGED,
    "generate": {"--max-new-tokens": "8"},
    "chat": {"--max-new-tokens": "8"},
    "bench": {
        "--contenders": "packed",
        "--rounds": "2",
        "--prompt-tokens": "4",
        "--new-tokens": "2",
    },
}
"""The options that every command of a verb has here."""
SMALLER = {
    "--keep-layers 24": "0.5",
    "--ffn 1024": "64",
    "--query-heads 2": "1",
    "--hidden-size 512": "48",
    "--max-size 400MiB": "0.65MiB",
    "--vocabulary-size 16384": "300",
    "--max-size 75MiB": "400KiB",
    "--max-size 60MiB": "400KiB",
    "--generated-windows 128": "4",
    "--generated-windows 192": "4",
    "--distill-epochs 2": "1",
    "--tune-passes 6": "1",
    "iterative.rewind_step=50": "iterative.rewind_step=1",
    '"windows": 64, "sequence_length": 512': '"windows": 4, "sequence_length": 32',
    "TrainingPlan(steps=200": "TrainingPlan(steps=2",
    "TrainingPlan(steps=500": "TrainingPlan(steps=2",
}
"""Sizes and counts of real models, and those of tiny ones."""


def shortened(words: list[str]) -> list[str]:
    """A command for a tiny model, with few and short windows, and few steps instead of minutes."""
    if words[0] == "cc":
        return words
    words = [NAMED.get(word, SMALLER.get(word, word)) for word in words]
    for place, pair in enumerate(pairwise(words), 1):
        words[place] = SMALLER.get(" ".join(pair), words[place])
    verb = words[words.index("secateur") + 1]
    if "--minutes" in words and verb != "fit":
        place = words.index("--minutes")
        words = words[:place] + words[place + 2 :]
    if verb == "demo" and words[2:3] != ["MODEL"]:  # its default is a real model
        words.insert(2, "MODEL")
    options = SHORT.get(verb, {})
    if verb in ("compress", "diagnose") and {"--calibration", "--dense"} & set(words):
        options = {name: text for name, text in CALIBRATED.items() if name != "--calibration"}
    if verb == "bench" and "--draft" in words:
        options = {"--new-tokens": "4"}
    if verb == "evaluate" and {"--generation", "--tasks"} & set(words) and "--text" not in words:
        options = {}
    for name, text in options.items():
        if name not in words:
            words += [name, text]
        elif name not in ("--text", "--calibration"):
            words[words.index(name) + 1] = text
    return words


def promised(page: Path) -> list[str]:
    """The files that a page says are there at its end."""
    rows = page.read_text(encoding="utf-8").partition("## What lies where")[2]
    return [
        path
        for row in re.findall(r"^\| (`.*?) \|", rows, re.M)
        for path in re.findall(r"`([^`]+)`", row)
    ]


@pytest.fixture
def folder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page is walked: a tiny model and texts."""
    monkeypatch.chdir(tmp_path)
    layers = 2 if page.startswith("docs/methods/") else 4
    page_givens.write_model("MODEL", FAMILIES.get(page, "llama"), layers)
    page_givens.write_texts()
    return tmp_path


def is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def prepare(words: list[str]) -> None:
    """Make what a command reads, and let nothing be where it writes."""
    output = words[words.index("--output") + 1] if "--output" in words else ""
    if output:
        shutil.rmtree(output, ignore_errors=True)
    for word in words:
        if word != output:
            page_givens.made(word)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft's own call
@pytest.mark.filterwarnings("ignore::secateur.structured.surgery.VariedSizesWarning")
@pytest.mark.parametrize("page", slow_but(BY_DEFAULT, WALKED))
def test_a_page_does_what_it_says(
    page: str,
    folder: Path,
    secateur: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = ROOT / f"{page}.md"
    names = {}
    if any(block.language == "python" for block in run_blocks(file)):
        names = page_givens.names("PRUNED" if page == "docs/trainers" else "MODEL")
    for block in run_blocks(file):
        if block.language == "python":
            text = block.text
            for name, stand_in in NAMED.items():
                text = text.replace(f'"{name}"', f'"{stand_in}"')
            for size, smaller in SMALLER.items():
                text = text.replace(size, smaller)
            for output in re.findall(r'output="(\w+)"', text):
                shutil.rmtree(output, ignore_errors=True)
            exec(compile(text, file, "exec"), names)
            continue
        for words in map(shortened, commands(block)):
            assert words[0] == "secateur"
            prepare(words)
            monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
            ended = secateur(*words[1:])
            assert ended.code == 0, f"{shlex.join(words)}\n{ended.out}\n{ended.err}"
    assert [path for path in promised(file) if not is_filled(folder / path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", AS_PROGRAMS)
def test_a_page_does_what_it_says_in_programs_of_their_own(page: str, folder: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(package.__file__).parents[1]), str(folder)]),
        "OMP_NUM_THREADS": "1",
    }
    file = ROOT / f"{page}.md"
    for number, block in enumerate(blocks(file)):
        if block.reason or block.language not in ("python", "toml", "bash", "c"):
            continue
        if block.language == "bash":
            started = [as_program(shortened(words)) for words in commands(block)]
        else:
            written = as_file(block, folder, number)
            started = [[sys.executable, *written]] if block.language == "python" else []
            if block.language == "toml":
                install(folder, block.text)
        for words in started:
            ended = subprocess.run(
                words,
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout}\n{ended.stderr}"
    assert [path for path in promised(file) if not is_filled(folder / path)] == []


def as_program(words: list[str]) -> list[str]:
    """A command as it is started here."""
    modules = {"secateur": "secateur", "torchrun": "torch.distributed.run"}
    launcher = [sys.executable, "-m", modules[words[0]]] if words[0] in modules else words[:1]
    return [*launcher, *words[1:]]


def as_file(block: Block, folder: Path, number: int) -> list[str]:
    """Write a block to the file that its first line names; Python runs it."""
    named = block.text.partition("\n")[0]
    place = named.split(" ", 1)[1] if named.startswith(("# ", "// ")) else f"block{number}.py"
    file = folder / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(block.text, encoding="utf-8")
    return [place]


def install(folder: Path, project: str) -> None:
    """What `pip install .` leaves: the entry points beside the package."""
    name = "".join(re.findall(r'^name = "(\w+)"', project, re.M)) or "energy"
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(.+)', project, re.M)
    target = folder / f"{name}-1.0.dist-info"
    target.mkdir()
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = "\n".join(f"[{group}]\n" + entry.replace('"', "") for group, entry in groups)
    (target / "entry_points.txt").write_text(points + "\n")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language_and_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "bash" and not block.reason:
            programs = {words[0] for words in commands(block)}
            assert programs <= {"secateur", "torchrun", "cc"}, block
        if block.language == "text":
            assert not re.search(r"^ *(secateur|pip|torchrun) ", block.text, re.M), block
    marks = re.findall(r"^<!-- not run:", page.read_text(encoding="utf-8"), re.M)
    assert len(marks) == sum(bool(block.reason) for block in blocks(page))


def test_every_how_to_says_what_lies_where() -> None:
    assert len(HOW_TO) == 11
    assert set(HOW_TO) <= {*WALKED, *AS_PROGRAMS}
    for page in HOW_TO:
        assert promised(ROOT / f"{page}.md"), page


def test_blocks_of_data_are_read() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "json":
                json.loads(block.text if block.text.startswith("{") else f"{{{block.text}}}")
            if block.language == "yaml":
                DATA[name_of(page)](yaml.safe_load(block.text))
