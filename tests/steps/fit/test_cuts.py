"""A fit that may remove experts, neurons and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import runner
from gguf_models import byte_level, save
from slow import slow_but
from stopped_stage import StopAt, StoppedError
from tokenizers_of_kinds import documents, save_tokenizer
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.checkpoint import shard_files
from secateur.models.skeleton import build_skeleton
from secateur.recipes.options import bytes_of
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting import cuts
from secateur.steps.fitting.cuts import FitCut
from secateur.steps.fitting.problem import CostKind, Costs
from secateur.structured.choices import CutLosses

MIXTURE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
SIZE = "130KiB"
"""All units in the fewest bits need more."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture, a dense model and windows."""
    place = tmp_path_factory.mktemp("experts")
    save(place / "mixture", byte_level(), "qwen3_moe", **MIXTURE)
    save(place / "dense", byte_level(), "llama")
    save_windows(tiny_windows(18, 48), place / "windows.safetensors")
    return place


def same_again(found: Any, place: Path) -> None:
    """The recipe in the folder of a fit makes the same bytes."""
    recipe = found.output / "secateur" / "recipe.yaml"
    again = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    secateur.chain(again.pop("model"), **{**again, "output": place / "again"})
    for one in shard_files(found.output):
        assert (place / "again" / one.name).read_bytes() == one.read_bytes()


@pytest.mark.parametrize("lever", slow_but(["experts"], ["experts", "neurons", "both"]))
def test_units_go_where_the_fewest_bits_do_not_fit(
    lever: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "MADE", 1)
    monkeypatch.setattr(
        CutLosses, "of_units", lambda self, share, *of: share * (lever == "experts")
    )
    monkeypatch.setattr(CutLosses, "of_experts", lambda self, kept: float(lever == "neurons"))
    options = {
        "effort": "fast",
        "target": "llama.cpp",
        "max_size": SIZE,
        "output": tmp_path / "out",
    }
    text = {"calibration": place / "windows.safetensors"}
    with pytest.raises(RecipeError, match="no model fits"):
        secateur.fit(place / "mixture", **options, **text)
    found = secateur.fit(place / "mixture", structure=True, **options, **text)
    (made,) = found.finalists
    (file,) = found.output.glob("*.gguf")
    assert file.stat().st_size == made.file_bytes <= bytes_of(SIZE)
    config = secateur.load(found.output).config
    assert (config.num_experts < 8, config.moe_intermediate_size < 64) == (
        lever != "neurons",
        lever != "experts",
    )
    experts = {name for name in found.kind_of if ".layers.0.mlp.experts." in name}
    assert len(experts) == 3 * config.num_experts
    listed = found.output / "secateur" / "experts.json"
    assert listed.exists() == (lever != "neurons")
    if listed.exists():
        assert {*map(len, json.loads(listed.read_bytes()).values())} == {config.num_experts}
    same_again(found, tmp_path)


@pytest.mark.slow
def test_all_units_stay_where_that_is_predicted_to_lose_less(place: Path, tmp_path: Path) -> None:
    found = secateur.fit(
        place / "mixture", output=tmp_path / "out", structure=True, effort="fast",
        max_size="700KiB", calibration=place / "windows.safetensors",
    )  # fmt: skip
    config = secateur.load(found.output).config
    assert (config.num_experts, config.moe_intermediate_size) == (8, 64)


def test_neurons_of_a_dense_model(place: Path, tmp_path: Path) -> None:
    text = {"calibration": place / "windows.safetensors", "effort": "fast"}
    with pytest.raises(RecipeError, match="no model fits") as caught:
        secateur.fit(place / "dense", output=tmp_path / "out", max_size="1KiB", **text)
    least = str(caught.value.remedy).split(" is ")[1].split(";")[0]
    size = f"{bytes_of(least) - 2048}"
    found = secateur.fit(
        place / "dense", output=tmp_path / "out", structure=True, max_size=int(size), **text
    )
    before = build_skeleton(place / "dense").config.intermediate_size
    assert secateur.load(found.output).config.intermediate_size < before
    assert found.loss.file_bytes <= int(size)


def test_where_nothing_can_go_structure_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = PackableCheckpoint.open(place / "dense")
    costs = Costs((CostKind("size", 0, 1.0),), opened.shapes, opened.ends)
    monkeypatch.setattr(cuts, "readers_of", lambda model, kinds: {})
    with pytest.raises(ArchitectureError) as caught:
        cuts.costs_of_fewest(costs, place / "dense")
    assert caught.value.where == "--structure"


@pytest.mark.parametrize("kind", ["mixture", "dense"])
def test_the_shapes_of_a_cut_are_those_that_structure_makes(
    kind: str, place: Path, tmp_path: Path
) -> None:
    opened = PackableCheckpoint.open(place / kind)
    costs = Costs((CostKind("size", 0, 1.0),), opened.shapes, opened.ends)
    kept = {0: (0, 2, 3, 4, 6), 1: (1, 2, 5, 6, 7)} if kind == "mixture" else None
    cut = FitCut(kept, 0.625)
    predicted = cut.shapes(costs, build_skeleton(place / kind))
    secateur.structure(
        place / kind, output=tmp_path / "cut", effort="fast",
        calibration=place / "windows.safetensors", **cut.options(tmp_path),
    )  # fmt: skip
    made = PackableCheckpoint.open(tmp_path / "cut").shapes
    assert sorted(predicted.values()) == sorted(made.values())
    assert len(made) < len(opened.shapes) or kind == "dense"


class StopAtLast(StopAt):
    """Stops at a stage of any part of a run."""

    def start(self, label: str, steps: int) -> None:
        super().start(label.rpartition(": ")[2], steps)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["surveying the layers", "tuning routers"])
def test_a_killed_fit_goes_on(
    stage: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "MADE", 1)
    monkeypatch.setattr(CutLosses, "of_units", lambda self, share, *of: 9.0 * share)
    options: dict[str, Any] = {
        "effort": "fast", "max_size": SIZE, "target": "llama.cpp", "structure": True,
        "calibration": place / "windows.safetensors",
    }  # fmt: skip
    whole = secateur.fit(place / "mixture", output=tmp_path / "whole", **options)
    options["output"] = tmp_path / "out"
    with pytest.raises(StoppedError):
        secateur.fit(place / "mixture", progress=StopAtLast(stage, 2), **options)
    found = secateur.fit(place / "mixture", resume=True, **options)
    for one in shard_files(whole.output):
        assert (found.output / one.name).read_bytes() == one.read_bytes()


def test_tokens_that_a_text_never_needs_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "model", "byte-level")
    save(tmp_path / "model", tokenizer, "llama")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": x}) for x in documents()[:4]), encoding="utf-8")
    found = secateur.fit(
        tmp_path / "model", output=tmp_path / "out", vocabulary=text, max_size="60KiB",
        calibration=text, windows=3, sequence_length=16, effort="fast",
    )  # fmt: skip
    rows = build_skeleton(found.output).config.vocab_size
    assert rows < build_skeleton(tmp_path / "model").config.vocab_size
    first = str(found.output / "secateur" / "trimming.yaml")
    done = runner(monkeypatch, capsys)("structure", first)
    assert done.code == 0, done
    assert build_skeleton(tmp_path / "out-trimmed").config.vocab_size == rows
    same_again(found, tmp_path)
