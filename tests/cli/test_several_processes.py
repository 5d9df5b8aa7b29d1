"""What the command line does when torchrun has started several processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from commands import Outcome

from secateur.recipes.verbs import VERBS

TOGETHER = {"prune", "structure", "train", "evaluate"}
WORDS = {"chat": ["DIR"], "methods": [], "demo": [], "push": ["DIR", "owner/name"]}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of torchrun."""
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in TOGETHER])
def test_a_verb_for_one_process_is_refused(secateur: Callable[..., Outcome], verb: str) -> None:
    done = secateur(verb, *WORDS.get(verb, ["DIR"]))
    assert done.code == 2
    assert f"secateur {verb}" in done.err
    assert "train, evaluate" in done.err
