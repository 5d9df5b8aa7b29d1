"""One file, several verbs: what is left is counted after each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from trained import source_text
from zoo import tiny_model, tiny_windows

import secateur
from secateur.errors import RecipeError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def steps_of(windows: Path) -> list[dict[str, dict[str, object]]]:
    """Depth, width, 2:4, int8."""
    calibration = {"source": str(windows)}
    return [
        {"structure": {"keep_layers": 2, "ffn": 0.5, "effort": "fast", "calibration": calibration}},
        {"prune": {"pattern": "2:4", "method": "wanda", "calibration": calibration}},
        {"compress": {"values": "int8"}},
    ]


def test_depth_width_pattern_int8(source: Path, tmp_path: Path, windows: Path) -> None:
    report = secateur.chain(source, output=tmp_path / "out", steps=steps_of(windows))
    names = [link.step for link in report.links]
    assert names == ["source", "structure", "prune", "compress"]
    whole, cut, sparse, small = report.links
    # a layer of a hidden size of 32, 4 heads and 2 KV heads of 8, and 24 of 48 neurons
    attention, neurons = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 24
    biases, norms = 32 + 16 + 16 + 32, 64
    layer = attention + neurons + biases + norms
    assert whole.parameters - cut.parameters == 2 * neurons + layer + neurons
    assert sparse.parameters == cut.parameters
    assert sparse.zeros == (attention + neurons) * 2 // 2
    assert small.zeros == sparse.zeros
    assert small.file_bytes < sparse.file_bytes < whole.file_bytes
    record = json.loads((tmp_path / "out" / "secateur" / "chain.json").read_text())
    assert [link["kept"] for link in record["links"]] == [link.kept for link in report.links]
    steps = tmp_path / "out" / "secateur" / "steps"
    assert sorted(x.name for x in steps.iterdir()) == ["01-structure", "02-prune"]
    assert not (tmp_path / "out.partial").exists()
    loaded = secateur.load(tmp_path / "out")
    assert loaded(tiny_windows(1)).logits.isfinite().all()
    other = steps_of(windows)
    other[0]["structure"]["ffn"] = 0.75
    with pytest.raises(RecipeError, match=r"structure: ffn"):
        secateur.chain(source, output=tmp_path / "out", steps=other, resume=True)
    assert not (tmp_path / "out.partial").exists()


def test_a_step_may_be_training_with_a_teacher(tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    save_tiny(source)
    text.write_text(source_text()[:30_000], encoding="utf-8")
    calibration = {"source": str(text), "windows": 4, "sequence_length": 32}
    steps = [
        {"structure": {"ffn": 0.5, "effort": "fast", "calibration": calibration}},
        {"prune": {"pattern": "2:4", "method": "wanda", "calibration": calibration}},
        {"train": {"teacher": source, "text": str(text), "steps": 3, "validation_windows": 2}},
    ]
    report = secateur.chain(source, output=tmp_path / "out", steps=steps)
    _, _, sparse, taught = report.links
    assert (taught.parameters, taught.zeros) == (sparse.parameters, sparse.zeros)
    records = json.loads((tmp_path / "out" / "secateur" / "training.json").read_text())
    assert records[0]["objective"] == "forward KL, T = 1"
    assert records[0]["recipe"]["teacher"] == str(source)


def test_a_chain_that_fails_goes_on_behind_what_is_done(
    source: Path, tmp_path: Path, windows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("secateur.steps.compress.Compress.work", fails)
        with pytest.raises(KeyboardInterrupt):
            secateur.chain(source, output=tmp_path / "out", steps=steps_of(windows))
    done = tmp_path / "out.partial" / "work" / "02-prune"
    before = (done / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(RecipeError, match="stopped"):
        secateur.chain(source, output=tmp_path / "out", steps=steps_of(windows))
    other = steps_of(windows)
    other[0]["structure"]["ffn"] = 0.75
    with pytest.raises(RecipeError, match=r"ffn: 0.5 then, 0.75 now") as error:
        secateur.chain(source, output=tmp_path / "out", steps=other, resume=True)
    assert error.value.where == "step 1, structure"
    assert (done / "model.safetensors").stat().st_mtime_ns == before
    report = secateur.chain(source, output=tmp_path / "out", steps=steps_of(windows), resume=True)
    assert report.links[-1].step == "compress"
    assert (tmp_path / "out" / "config.json").exists()


def test_a_step_that_is_not_done_may_be_corrected(
    source: Path, tmp_path: Path, windows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    calibration = {"source": str(windows)}
    cut = {"structure": {"keep_layers": 2, "effort": "fast", "calibration": calibration}}
    prune = {"sparsity": 0.5, "method": "wanda", "calibration": calibration}
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("secateur.steps.prune.prune_layers", fails)
        with pytest.raises(KeyboardInterrupt):
            secateur.chain(source, output=out, steps=[cut, {"prune": prune}])
    done = out.with_name("out.partial") / "work" / "01-structure"
    before = (done / "model.safetensors").stat().st_mtime_ns
    for wrong, error in (
        ({"values": "int5"}, "values='int5': "),
        ({"vales": 1}, "vales"),
    ):
        with pytest.raises(RecipeError, match=error) as refused:
            secateur.chain(
                source, output=out, steps=[cut, {"prune": prune}, {"compress": wrong}], resume=True
            )
        assert refused.value.where == "step 3, compress"
    assert (done / "model.safetensors").stat().st_mtime_ns == before
    corrected = [cut, {"prune": {**prune, "sparsity": 0.25}}, {"compress": {"values": "int8"}}]
    report = secateur.chain(source, output=out, steps=corrected, resume=True)
    names = [link.step for link in report.links]
    assert names == ["source", "structure", "prune", "compress"]
    recipe = out / "secateur" / "steps" / "02-prune" / "recipe.yaml"
    assert "sparsity: 0.25" in recipe.read_text()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "steps"),
        ([{"prun": {}}], "did you mean 'prune'"),
        ([{"prune": {"sparsty": 0.5}}], "sparsty: unknown key"),
        ([{"structure": {"ffn": 0.5}}, {"compress": {"vales": "int8"}}], "vales: unknown key"),
        ([{"prune": {"output": "x"}}], "an option of the chain"),
        ([{"prune": {}, "compress": {}}], "one verb"),
    ],
)
def test_faults_are_reported_before_any_work(
    steps: list[dict[str, dict[str, object]]], said: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.chain(source, output=tmp_path / "out", steps=steps)
    assert not (tmp_path / "out.partial").exists()
