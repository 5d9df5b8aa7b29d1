"""Commands under torchrun, as a user gives them: what several processes make is what one makes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome, launched
from page_blocks import ROOT
from tiny import save_tiny, tensors_of
from trained import source_text

from secateur.recipes.prune import presets

MODELS = ("dense", "experts")
PAGES = ("README", "docs/machines", "docs/howto/several-machines", "docs/training")


def commands_of_pages(program: str) -> list[str]:
    """The commands of the pages about several processes, in blocks and in sentences."""
    pages = [(ROOT / f"{page}.md").read_text(encoding="utf-8") for page in PAGES]
    text = "\n".join(pages).replace("\\\n", " ")
    found = re.findall(rf"`({program} [^`]*)`|^({program} [^\n]*)$", text, re.M)
    return [inline or line for inline, line in found]


TORCHRUN = commands_of_pages("torchrun")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a text."""
    place = tmp_path_factory.mktemp("torchrun")
    save_tiny(place / "dense", num_hidden_layers=2)
    save_tiny(place / "experts", "mixtral", num_hidden_layers=2)
    (place / "text.txt").write_text(source_text()[:20_000])
    return place


def started(processes: int, *words: object) -> Outcome:
    """Run a command in so many processes."""
    return launched(processes, "-m", "secateur", *words)


Both = Callable[..., tuple[Path, Path]]


@pytest.fixture
def both(place: Path, tmp_path: Path) -> Both:
    """A function that runs a verb in one process and in two, and returns both outputs."""

    def made(verb: str, model: str, *words: object) -> tuple[Path, Path]:
        outputs = tmp_path / "one", tmp_path / "two"
        for processes, output in enumerate(outputs, 1):
            ended = started(processes, verb, place / model, "--output", output, *words)
            assert ended.code == 0, ended.err[-4000:]
        return outputs

    return made


def text(place: Path, option: str = "--calibration") -> list[object]:
    """Options that make a run short."""
    return [option, place / "text.txt", "--windows", 6, "--sequence-length", 16]


@pytest.mark.slow
@pytest.mark.parametrize(("effort", "model"), [*zip(presets, [*MODELS, *MODELS], strict=True)])
def test_prune(both: Both, place: Path, effort: str, model: str) -> None:
    """Each effort; `test_together.py` has each for both models."""
    learned = ["--distill-tokens", 256] if presets[effort].get("distillation") else []
    one, two = both(
        "prune", model, "--effort", effort, "--sparsity", 0.5, "--micro-batch-tokens", 16,
        *text(place), *learned,
    )  # fmt: skip
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    manifest = json.loads((two / "secateur" / "manifest.json").read_text())
    assert manifest["cost"]["processes"] == 2


@pytest.mark.slow
def test_structure(both: Both, place: Path) -> None:
    one, two = both("structure", "experts", "--experts", 2, *text(place))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_train(both: Both, place: Path, model: str) -> None:
    """Gradients are summed in another order. Adam moves a weight with a tiny one by a whole step in
    either direction, so a few weights differ by more than rounding.
    """
    one, two = both(
        "train", model, "--steps", 3, "--batch", 2, "--validation-windows", 2,
        *text(place, "--text"), "--windows", 12,
    )  # fmt: skip
    ours, theirs, dense = (tensors_of(folder) for folder in (one, two, place / model))
    assert ours.keys() == theirs.keys()
    differing, moved = (
        torch.cat([(ours[name].double() - other[name].double()).flatten() for name in dense])
        for other in (theirs, dense)
    )
    assert differing.norm() < 0.05 * moved.norm()
    assert int(moved.count_nonzero()) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_evaluate(place: Path, tmp_path: Path, model: str) -> None:
    words = [place / model, "--dense", place / model, *text(place, "--text"), "--json"]
    found = []
    for processes in (1, 2):
        ended = started(processes, "evaluate", *words)
        assert ended.code == 0, ended.err[-4000:]
        found.append(json.loads(ended.out)["perplexity"][0])
    assert found[1]["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-6)
    assert found[1]["protocol_id"] == found[0]["protocol_id"]


def on_tiny(command: str, place: Path, output: Path) -> list[str]:
    """The words of a page's command behind `secateur`, for a tiny model and a short run."""
    words = shlex.split(command.replace("…", ""))
    words = words[words.index("secateur") + 1 :]
    options = {"--output": output, "--windows": 6, "--sequence-length": 16}
    if words[0] == "train":
        options |= {"--text": place / "text.txt", "--steps": 2, "--windows": 24}
        options |= {"--validation-windows": 2}
    else:
        options |= {"--calibration": place / "text.txt", "--sparsity": 0.5}
    for name, value in options.items():
        words += [] if name in words else [name, ""]
        words[words.index(name) + 1] = str(value)
    return [str(place / "dense") if word in ("MODEL", "PRUNED") else word for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("command", TORCHRUN)
def test_a_torchrun_command_of_a_page(place: Path, tmp_path: Path, command: str) -> None:
    """All are run here in two processes of this machine."""
    ended = started(2, *on_tiny(command, place, tmp_path / "out"))
    assert ended.code == 0, ended.err[-4000:]
    assert tensors_of(tmp_path / "out")


def test_the_pages_have_such_commands() -> None:
    assert len(TORCHRUN) >= 3
