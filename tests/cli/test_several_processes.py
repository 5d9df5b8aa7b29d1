"""What the command line does when torchrun has started several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome

from secateur.recipes.verbs import VERBS

TOGETHER = {"prune", "structure", "train", "evaluate"}
OUTPUT = ["DIR", "--output", "OUT"]
WORDS = {
    **dict.fromkeys(("compress", "decompress", "draft", "import", "export"), OUTPUT),
    "methods": [], "demo": [], "push": ["DIR", "owner/name"],
    "fit": [*OUTPUT, "--max-size", "1MiB"], "chain": [*OUTPUT, "--set", "steps=[prune: {}]"],
    "sweep": [*OUTPUT, "--methods", "wanda"], "advise": ["DIR"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of torchrun."""
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def refused(secateur: Callable[..., Outcome], tmp_path: Path) -> Callable[..., None]:
    """A function that runs a command, which must name itself in its refusal."""

    def run(verb: str, *words: str) -> None:
        done = secateur(verb, *(str(tmp_path) if word == "DIR" else word for word in words))
        assert done.code == 2
        assert f"secateur {verb}" in done.err
        assert "torchrun" in done.err

    return run


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in TOGETHER])
def test_a_verb_for_one_process_is_refused(refused: Callable[..., None], verb: str) -> None:
    refused(verb, *WORDS.get(verb, ["DIR"]))


@pytest.mark.parametrize(
    ("verb", "words"),
    [("prune", ["--sparsity", "0.5"]), ("structure", ["--keep-layers", "1"]), ("train", [])],
)
def test_a_dry_run_has_one_process(
    refused: Callable[..., None], verb: str, words: list[str]
) -> None:
    refused(verb, "DIR", "--dry-run", *words)
