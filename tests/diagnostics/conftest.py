"""A dense model and a pruned one, which tests may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diagnostics.planted import Pair, make_pair


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(made: Pair, tmp_path: Path) -> Pair:
    """A copy that may be broken."""
    shutil.copytree(made.dense.parent, tmp_path / "pair")
    return Pair(tmp_path / "pair")
