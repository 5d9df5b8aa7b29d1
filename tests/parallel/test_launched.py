"""What a launcher must have set."""

from __future__ import annotations

import pytest

from secateur.errors import RecipeError
from secateur.parallel.launched import Launched
from secateur.parallel.processes import joined
from secateur.parallel.ranks import ALONE

GOOD = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "first", "MASTER_PORT": "29500",
}  # fmt: skip


def test_the_variables_of_torchrun_are_read() -> None:
    assert Launched.read(GOOD) == Launched(3, 4, 1, 2, "first", 29500)
    assert Launched.read({}) == Launched.read({"WORLD_SIZE": "1"}) == Launched()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, "RANK is not set; a number from 0 to 3"),
        ("RANK", "4", "RANK is '4'; a number from 0 to 3"),
        ("RANK", "-1", "RANK is '-1'"),
        ("WORLD_SIZE", "many", "WORLD_SIZE is 'many'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0'"),
        ("LOCAL_RANK", "2", "LOCAL_RANK is '2'; a number from 0 to 1"),
        ("LOCAL_WORLD_SIZE", "8", "LOCAL_WORLD_SIZE is '8'; a number from 1 to 4"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not"),
        ("MASTER_PORT", "70000", "MASTER_PORT is '70000'"),
    ],
)
def test_bad_variables_are_refused_by_name(name: str, value: str | None, said: str) -> None:
    bad = {k: v for k, v in {**GOOD, name: value}.items() if v is not None}
    with pytest.raises(RecipeError, match=said) as caught:
        Launched.read(bad)
    assert "torchrun" in (caught.value.remedy or "")


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert joined() is ALONE
