"""All steps of a chain are checked before the first, and a fault names its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurError

PRUNE = {"prune": {"method": "magnitude", "sparsity": 0.5}}

FAULTS: list[tuple[Any, str]] = [
    ({"compress": {"values": "int5"}}, "values='int5': must be auto, keep"),
    ({"compress": {"values": ["int8"]}}, "values=\\['int8'\\]: must be auto"),
    ({"compress": {"format": "zip"}}, "unknown format 'zip'"),
    ({"compress": {"embeddings": "int4"}}, "embeddings='int4': must be auto or int8"),
    ({"compress": {"archive": "yes"}}, "archive='yes': must be true or false"),
    ({"compress": {"windows": 4}}, "there is none"),
    ({"compress": {"calibration": "c4"}}, "the values are 'auto'"),
    ({"compress": {"values": "int8", "calibration": "c4", "windows": -1}}, "windows"),
    ({"compress": {"values": "int8", "calibration": 5}}, "source"),
    ({"compress": {"vales": "int8"}}, "vales: unknown key; did you mean 'values'"),
    ({"compress": {"trust_remote_code": True}}, "'trust_remote_code' is an option of the chain"),
    ({"compress": "int8"}, "not keys and values"),
    ({"prune": {"method": "wonda", "sparsity": 0.5}}, "wonda"),
    ({"prune": {"method": "wanda", "sparsity": 7}}, "sparsity=7: must be less than 1"),
    ({"prune": {"method": "wanda", "pattern": "5:4"}}, "5:4"),
    ({"prune": {"method": "wanda", "sparsity": 0.5, "allocation": "fair"}}, "fair"),
    ({"prune": {"method": "wanda", "sparsity": 0.5, "device": "tpu"}}, "tpu"),
    ({"prune": {"sparsity": "0.5"}}, "sparsity='0.5': must be a number"),
    ({"train": {"teacher": "m", "temperature": float("inf")}}, "finite number"),
    ({"train": {"learning_rate": float("nan")}}, "finite number"),
    ({"train": {"optimizer": "Adm"}}, "no optimizer 'Adm'"),
    ({"train": {"gradual": {"sparsity": 0.5, "schedule": "cubical"}}}, "unknown schedule"),
    ({"structure": {}}, "the recipe cuts nothing"),
    ({"structure": {"ffn": 0.5, "score": "wandas"}}, "unknown score 'wandas'"),
    ({"structure": {"ffn": 0.5, "heads": 0.5}}, "heads: this key is now called 'kv_groups'"),
]


@pytest.mark.parametrize(("step", "what"), FAULTS)
def test_a_fault_in_the_second_step(model: Path, tmp_path: Path, step, what: str) -> None:
    with pytest.raises(SecateurError, match=what) as error:
        secateur.chain(model, output=tmp_path / "out", steps=[PRUNE, step])
    assert str(error.value.where).startswith("step 2 of the chain")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("steps", [None, 5, "prune", {"prune": {}}, [], [5]])
def test_what_is_no_list_of_steps(model: Path, tmp_path: Path, steps: Any) -> None:
    with pytest.raises(SecateurError, match="steps"):
        secateur.chain(model, output=tmp_path / "out", steps=steps)
