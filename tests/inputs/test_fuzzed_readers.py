"""Whatever a file says, its reader raises a SecateurError or nothing; for folders: `hostile.py`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.mutations import anywhere
from secateur.calibration.documents import read_documents
from secateur.errors import SecateurError
from secateur.recipes.prune import ChainRecipe, PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.recipe_files import read_recipe_file
from secateur.recipes.structure import StructureRecipe
from secateur.steps.chain import checked_steps


def bounded(examples: int) -> settings:
    """So many examples, the same ones each time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


KEYS = ["model", "sparsity", "pattern", "calibration", "include", "prune", "x"]
DRAWS = st.randoms(use_true_random=False)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A name for files, without its ending."""
    return tmp_path_factory.mktemp("fuzz") / "file"


def refused_or_read(read: Callable[[], Any]) -> None:
    """Read; any exception but ours is a failure of the test."""
    try:
        read()
    except SecateurError as error:
        assert 0 < len(str(error)) < 5000  # noqa: PT017


@bounded(150)
@given(
    st.binary(max_size=60)
    | JSON.map(lambda x: json.dumps(x).encode())
    | st.text("ab:-[]{}&*!|>' 019.e" + chr(10), max_size=60).map(str.encode)
    | st.dictionaries(st.sampled_from(KEYS), JSON).map(lambda x: json.dumps(x).encode())
)
def test_recipes(file: Path, content: bytes) -> None:
    file = file.with_suffix(".yaml")
    file.write_bytes(content)
    for kind in (PruneRecipe, StructureRecipe, ChainRecipe):
        refused_or_read(lambda kind=kind: build_recipe(kind, read_recipe_file(file)))
    refused_or_read(lambda: checked_steps([read_recipe_file(file)], "m"))


@bounded(150)
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=30), max_size=3), st.booleans())
def test_calibration_lines(file: Path, lines: list[str], zipped: bool) -> None:
    file = file.with_suffix(".jsonl.gz" if zipped else ".jsonl")
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    refused_or_read(lambda: read_documents(str(file)))


@bounded(150)
@given(DRAWS)
def test_conversations(file: Path, draw: random.Random) -> None:
    talk = [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b", "tool_calls": []}]
    pair = {
        "prompt": talk[:1],
        "completion": [{"role": "assistant", "content": [{"type": "text"}]}],
    }
    rows = [{"messages": talk, "tools": [{}]}, {"conversations": talk}, pair, {"text": "c"}]
    file = file.with_suffix(".jsonl")
    file.write_text(json.dumps(anywhere(draw, draw.choice(rows))), encoding="utf-8")
    refused_or_read(lambda: read_documents(str(file)))
