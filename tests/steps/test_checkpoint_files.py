"""What was measured of a model is said of another only if the weights are the same, and marked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny

import secateur
from secateur.runs.measured import read_evaluation

MEASURED = {"evaluation.json", "diagnosis.json", "bench.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model of bfloat16 that was judged, diagnosed and timed."""
    place = tmp_path_factory.mktemp("carrying")
    save_tiny(place / "dense", dtype=torch.bfloat16)
    run = place / "run"
    secateur.prune(place / "dense", output=run, method="magnitude", sparsity=0.5)
    text = place / "text.txt"
    text.write_text("the stone by the river, a lamp on paper. " * 12)
    secateur.evaluate(
        run, dense=place / "dense", text=text, sequence_length=32, generation=True,
        prompts=["the lamp"],
    )  # fmt: skip
    secateur.diagnose(run)
    (run / "secateur" / "bench.json").write_text(
        json.dumps(
            {
                "schema": "secateur.bench/1",
                "model": "m",
                "contenders": [],
                "file_bytes": 1,
                "dense_bytes": 1,
                "verdict": "",
                "protocol": {},
            }
        )
    )
    steps = run / "secateur" / "steps" / "prune"
    steps.mkdir(parents=True)
    (steps / "bench.json").write_text("{}")
    return place


def measured(folder: Path) -> set[str]:
    return {file.name for file in (folder / "secateur").iterdir()} & MEASURED


@pytest.mark.parametrize(
    "options",
    [{"values": "int8"}, {"values": "int4"}, {"values": "float16"}, {"embeddings": "int8"}],
    ids=["int8", "int4", "cast", "embeddings"],
)
def test_numbers_of_other_weights_are_left_behind(place, tmp_path, options) -> None:
    """On 80ad24a the int8 model showed the perplexity of the float model."""
    secateur.compress(place / "run", output=tmp_path / "small", **options)
    assert measured(tmp_path / "small") == set()
    assert (tmp_path / "small" / "secateur" / "manifest.json").is_file()
    assert (tmp_path / "small" / "secateur" / "steps" / "prune" / "bench.json").is_file()
    page = secateur.report([tmp_path / "small"], tmp_path / "page.html").page.read_text()
    [judged] = read_evaluation(place / "run" / "secateur" / "evaluation.json").perplexity
    assert f"{judged.perplexity:.2f}" not in page


def test_numbers_of_the_same_weights_are_marked(place, tmp_path) -> None:
    run, small, again = place / "run", tmp_path / "small", tmp_path / "again"
    secateur.compress(run, output=small, values="keep")
    secateur.decompress(small, output=again)
    before = read_evaluation(run / "secateur" / "evaluation.json")
    for folder in (small, again):
        assert measured(folder) == {"evaluation.json"}
        found = read_evaluation(folder / "secateur" / "evaluation.json")
        assert {one.inherited_from for one in found.results} == {str(run)}
        assert found.perplexity[0].perplexity == before.perplexity[0].perplexity
    card = tmp_path / "card.md"
    page = secateur.report([small], tmp_path / "page.html", card=card).page.read_text()
    for shown in (page, card.read_text()):
        assert "the same weights" in shown
    assert "same weights" in page
    own = secateur.report([run], tmp_path / "own.html").page.read_text()
    assert "same weights" not in own
    text = place / "text.txt"
    secateur.evaluate(small, text=text, sequence_length=32)
    found = read_evaluation(small / "secateur" / "evaluation.json")
    assert found.perplexity[0].inherited_from is None
    assert found.divergence[0].inherited_from == str(run)


def test_decompressed_int8_is_another_model(place, tmp_path) -> None:
    small, again = tmp_path / "small", tmp_path / "again"
    secateur.compress(place / "run", output=small, values="int8")
    shutil.copy(place / "run" / "secateur" / "evaluation.json", small / "secateur")
    secateur.decompress(small, output=again)
    assert measured(again) == set()


def test_a_model_on_the_grid_stays_the_same_model(place, tmp_path) -> None:
    small, dense, again = (tmp_path / name for name in ("small", "dense", "again"))
    kept = {"values": "int4", "embeddings": "keep"}
    secateur.compress(place / "run", output=small, **kept)
    shutil.copy(place / "run" / "secateur" / "evaluation.json", small / "secateur")
    secateur.decompress(small, output=dense)
    assert measured(dense) == {"evaluation.json"}
    secateur.compress(dense, output=again, **kept)
    assert measured(again) == {"evaluation.json"}
    secateur.compress(dense, output=tmp_path / "both", values="int4", embeddings="int8")
    assert measured(tmp_path / "both") == set()


def test_a_trained_model_is_another_model(place, tmp_path) -> None:
    options: dict[str, Any] = {"text": str(place / "text.txt"), "steps": 1, "batch": 1}
    secateur.train(
        place / "run", output=tmp_path / "out", sequence_length=16, validation_windows=0, **options
    )
    assert measured(tmp_path / "out") == set()
    assert (tmp_path / "out" / "secateur" / "training.json").is_file()


def test_a_model_without_notes_gets_none(tmp_path) -> None:
    """What lies beside a compression record alone does not outlive it."""
    save_tiny(tmp_path / "dense")
    secateur.compress(tmp_path / "dense", output=tmp_path / "small", values="keep")
    notes = {file.name for file in (tmp_path / "small" / "secateur").iterdir()}
    assert notes == {"compression.json", "run.json"}
    secateur.decompress(tmp_path / "small", output=tmp_path / "again")
    assert not (tmp_path / "again" / "secateur").exists()
