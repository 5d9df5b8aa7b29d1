"""Whatever a file says, what leaves its reader is a SecateurError and nothing else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny

import secateur
from runtime.mutations import anywhere
from runtime.packed_models import packed_model
from secateur.calibration.documents import read_documents
from secateur.errors import CheckpointError, SecateurError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import check_folder
from secateur.recipes.prune import ChainRecipe, PruneRecipe
from secateur.recipes.reading import build_recipe, read_recipe_file
from secateur.recipes.structure import StructureRecipe
from secateur.steps.chain import checked_steps
from secateur.steps.inspect import inspect


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
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense folder in two files, a packed one, and room for their copies."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "p").mkdir()
    return {
        "dense": save_tiny(place / "m", shards=2, tie_word_embeddings=False),
        "packed": packed_model(place / "p"),
        "copy": place / "copy",
        "file": place / "file",
    }


def refused_or_read(read: Callable[[], Any]) -> bool:
    """Whether a reader refused; any other exception is a failure of the test."""
    try:
        read()
    except SecateurError as error:
        message = str(error)
    else:
        return False
    assert message
    assert len(message) < 5000
    return True


def copied(places: dict[str, Path], kind: str) -> Path:
    shutil.rmtree(places["copy"], ignore_errors=True)
    return Path(shutil.copytree(places[kind], places["copy"]))


def edited(file: Path, draw: random.Random, times: int = 1) -> None:
    """Change a JSON file in some places, or, sometimes, its bytes."""
    raw = file.read_bytes()
    if draw.random() < 0.15:
        at = draw.randrange(len(raw))
        file.write_bytes(raw[:at] + bytes(draw.randrange(256) for _ in range(4)) + raw[at + 2 :])
        return
    value = json.loads(raw)
    for _ in range(times):
        value = anywhere(draw, value)
    file.write_text(json.dumps(value))


@bounded(150)
@given(
    st.binary(max_size=60)
    | JSON.map(lambda x: json.dumps(x).encode())
    | st.text("ab:-[]{}&*!|>' 019.e" + chr(10), max_size=60).map(str.encode)
    | st.dictionaries(st.sampled_from(KEYS), JSON).map(lambda x: json.dumps(x).encode())
)
def test_recipes(places: dict[str, Path], content: bytes) -> None:
    file = places["file"].with_suffix(".yaml")
    file.write_bytes(content)
    for kind in (PruneRecipe, StructureRecipe, ChainRecipe):
        refused_or_read(lambda kind=kind: build_recipe(kind, read_recipe_file(file)))
    refused_or_read(lambda: checked_steps([read_recipe_file(file)], "m"))


@bounded(60)
@given(DRAWS)
def test_configurations_of_dense_folders(places: dict[str, Path], draw: random.Random) -> None:
    folder = copied(places, "dense")
    edited(folder / "config.json", draw, draw.choice([1, 1, 2]))
    refused_or_read(lambda: inspect(str(folder)))


@bounded(60)
@given(DRAWS)
def test_configurations_of_packed_folders(places: dict[str, Path], draw: random.Random) -> None:
    folder = copied(places, "packed")
    edited(folder / "config.json", draw, draw.choice([1, 1, 2]))
    refused_or_read(lambda: inspect(str(folder)))
    refused_or_read(lambda: secateur.load(folder))


@bounded(80)
@given(DRAWS)
def test_indices(places: dict[str, Path], draw: random.Random) -> None:
    for kind, name in (
        ("dense", "model.safetensors.index.json"),
        ("packed", "secateur.safetensors.index.json"),
    ):
        folder = copied(places, kind)
        edited(folder / name, draw)
        refused_or_read(lambda: inspect(str(folder)))  # noqa: B023


@bounded(150)
@given(DRAWS)
def test_headers(places: dict[str, Path], draw: random.Random) -> None:
    folder = copied(places, "dense")
    file = sorted(folder.glob("*.safetensors"))[0]
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(anywhere(draw, json.loads(raw[8 : 8 + length]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    refused_or_read(lambda: CheckpointReader(folder))
    refused_or_read(lambda: check_folder(folder))
    refused_or_read(lambda: inspect(str(folder)))


@bounded(150)
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=30), max_size=3), st.booleans())
def test_calibration_lines(places: dict[str, Path], lines: list[str], zipped: bool) -> None:
    file = places["file"].with_suffix(".jsonl.gz" if zipped else ".jsonl")
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    refused_or_read(lambda: read_documents(str(file)))


@bounded(150)
@given(DRAWS)
def test_conversations(places: dict[str, Path], draw: random.Random) -> None:
    talk = [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b", "tool_calls": []}]
    pair = {
        "prompt": talk[:1],
        "completion": [{"role": "assistant", "content": [{"type": "text"}]}],
    }
    rows = [{"messages": talk, "tools": [{}]}, {"conversations": talk}, pair, {"text": "c"}]
    file = places["file"].with_suffix(".jsonl")
    file.write_text(json.dumps(anywhere(draw, draw.choice(rows))), encoding="utf-8")
    refused_or_read(lambda: read_documents(str(file)))


def test_the_folders_are_sound(places: dict[str, Path]) -> None:
    for kind in ("dense", "packed"):
        assert not refused_or_read(lambda kind=kind: inspect(str(copied(places, kind))))
    with pytest.raises(CheckpointError):
        inspect(str(places["copy"].parent))
