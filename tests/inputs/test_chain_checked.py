"""All steps of a chain are checked before the first, and a fault names its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurError

PRUNE = {"prune": {"method": "magnitude", "sparsity": 0.5}}

FAULTS: list[tuple[Any, str]] = [
    ({"compress": {"values": "int3"}}, "unknown values 'int3'"),
    ({"compress": {"values": ["int8"]}}, "unknown values"),
    ({"compress": {"format": "zip"}}, "unknown format 'zip'"),
    ({"compress": {"embeddings": "int4"}}, "embeddings cannot be 'int4'"),
    ({"compress": {"archive": "yes"}}, "archive is 'yes'"),
    ({"compress": {"samples": 4}}, "there is none"),
    ({"compress": {"calibration": "c4"}}, "values are to be 'auto'"),
    ({"compress": {"values": "int8", "calibration": "c4", "samples": -1}}, "samples"),
    ({"compress": {"values": "int8", "calibration": 5}}, "source"),
    ({"compress": {"vales": "int8"}}, "no option 'vales'"),
    ({"compress": {"trust_remote_code": True}}, "no option 'trust_remote_code'"),
    ({"compress": "int8"}, "not keys and values"),
    ({"prune": {"method": "wonda", "sparsity": 0.5}}, "wonda"),
    ({"prune": {"method": "wanda", "sparsity": 7}}, "sparsity 7"),
    ({"prune": {"method": "wanda", "pattern": "5:4"}}, "5:4"),
    ({"prune": {"method": "wanda", "sparsity": 0.5, "allocation": "fair"}}, "fair"),
    ({"prune": {"method": "wanda", "sparsity": 0.5, "device": "tpu"}}, "tpu"),
    ({"prune": {"sparsity": "0.5"}}, "valid number"),
    ({"distill": {"temperature": float("inf")}}, "finite number"),
    ({"retrain": {"learning_rate": float("nan")}}, "finite number"),
]


@pytest.mark.parametrize(("step", "what"), FAULTS)
def test_a_fault_in_the_second_step(model: Path, tmp_path: Path, step, what: str) -> None:
    with pytest.raises(SecateurError, match=what) as error:
        secateur.chain(model, output=tmp_path / "out", steps=[PRUNE, step])
    assert str(error.value.where).startswith("step 2 of the chain")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("steps", [None, 5, "prune", {"prune": {}}, []])
def test_what_is_no_list_of_steps(model: Path, tmp_path: Path, steps: Any) -> None:
    with pytest.raises(SecateurError, match="no steps"):
        secateur.chain(model, output=tmp_path / "out", steps=steps)
