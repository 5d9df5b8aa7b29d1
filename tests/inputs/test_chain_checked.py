"""All steps of a chain are checked before the first, and a fault names its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import RecipeError, SecateurError, SourceError

PRUNE = {"prune": {"method": "magnitude", "sparsity": 0.5}}

FAULTS: list[tuple[Any, str]] = [
    ({"compress": {"values": "int5"}}, "values='int5':"),
    ({"compress": {"format": "zip"}}, "unknown format 'zip'"),
    ({"compress": {"embeddings": "int5"}}, "embeddings='int5'"),
    ({"compress": {"archive": "yes"}}, "archive='yes':"),
    ({"compress": {"windows": 4}}, "changes nothing without calibration"),
    ({"compress": {"calibration": "c4"}}, "the values are 'auto'"),
    ({"compress": {"vales": "int8"}}, "vales: unknown key; did you mean 'values'"),
    ({"compress": {"trust_remote_code": True}}, "'trust_remote_code' is an option of the chain"),
    ({"compress": "int8"}, "not keys and values"),
    ({"prune": {"method": "wanda", "sparsity": 7}}, "sparsity=7:"),
    ({"prune": {"method": "wanda", "sparsity": 0.5, "allocation": "fair"}}, "fair"),
    ({"prune": {"method": "wanda", "sparsity": 0.5, "device": "tpu"}}, "tpu"),
    ({"train": {"teacher": "m", "temperature": float("inf")}}, "finite number"),
    ({"train": {"optimizer": "Adm"}}, "no optimizer 'Adm'"),
    ({"train": {"gradual": {"sparsity": 0.5, "schedule": "cubical"}}}, "unknown schedule"),
    ({"structure": {}}, "the recipe cuts nothing"),
    ({"structure": {"keep_layers": 99}}, "keeps 99 decoder layers, but the model has"),
    ({"structure": {"hidden_size": 999}}, "keeps 999 channels"),
    ({"structure": {"ffn": 0.5, "vocabulary": "nofile.txt"}}, "no text is named 'nofile.txt'"),
    ({"train": {"text": "nofile.txt"}}, "no text is named 'nofile.txt'"),
    ({"train": {"validation_text": "nofile.txt"}}, "no text is named 'nofile.txt'"),
    ({"train": {"teacher": "./nowhere"}}, "no such file or folder"),
    ({"train": {"mask": "masks.safetensors"}}, "there is no such file"),
    (
        {"prune": {"sparsity": 0.5, "calibration": "wikitext2,nofile.jsonl=2"}},
        "no text is named 'nofile.jsonl'",
    ),
    ({"prune": {"sparsity": 0.5, "compress": "int8"}}, "compression is a step of its own"),
    ({"compress": {"values": "int8", "calibration": "nofile.txt"}}, "no text is named"),
]


@pytest.mark.parametrize(("step", "what"), FAULTS)
def test_a_fault_in_the_second_step(model: Path, tmp_path: Path, step, what: str) -> None:
    with pytest.raises(SecateurError, match=what) as error:
        secateur.chain(model, output=tmp_path / "out", steps=[PRUNE, step])
    assert str(error.value.where).startswith("step 2, ")
    assert not (tmp_path / "out.partial").exists()


def test_compression_comes_last(model: Path, tmp_path: Path) -> None:
    steps = [{"compress": {"values": "int8"}}, PRUNE]
    with pytest.raises(RecipeError, match="put compress last") as error:
        secateur.chain(model, output=tmp_path / "out", steps=steps)
    assert error.value.where == "step 2, prune"
    assert not (tmp_path / "out.partial").exists()


def test_a_later_cut_counts_the_layers_that_are_left(model: Path, tmp_path: Path) -> None:
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    cuts = [{"structure": {"keep_layers": n, "effort": "fast"}} for n in (layers - 1, layers)]
    with pytest.raises(RecipeError, match=f"has {layers - 1}") as error:
        secateur.chain(model, output=tmp_path / "out", steps=cuts)
    assert error.value.where == "step 2, structure"
    assert not (tmp_path / "out.partial").exists()


def test_a_step_that_fails_is_named_and_the_first_leaves_nothing(
    model: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abc", encoding="utf-8")
    steps = [{"train": {"text": str(short), "steps": 1, "sequence_length": 16}}]
    with pytest.raises(SourceError, match="windows of 16 tokens") as error:
        secateur.chain(model, output=tmp_path / "out", steps=steps)
    assert error.value.where == f"step 1, train: {short}"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("steps", [None, 5, "prune", {"prune": {}}, [], [5]])
def test_what_is_no_list_of_steps(model: Path, tmp_path: Path, steps: Any) -> None:
    with pytest.raises(SecateurError, match="steps"):
        secateur.chain(model, output=tmp_path / "out", steps=steps)
