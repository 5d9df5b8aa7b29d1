"""`secateur inspect`: all layers, one layer, and a GGUF file by its header alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.reporting.diagnose import InspectResult


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three layers; half of one matrix of the second is zero."""
    folder = save_tiny(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[: len(weight) // 2] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_line_for_each_layer(model: Path) -> None:
    result = secateur.inspect(model)
    assert isinstance(result, InspectResult)
    table = result.layers()
    assert [row[0] for row in table.rows] == ["0", "1", "2"]
    assert [row[1] for row in table.rows] == ["7", "7", "7"]
    dense, pruned, _ = table.rows
    assert dense[3] == "0.0%"
    assert pruned[3] != "0.0%"
    assert pruned[5] == "50.0% up_proj"
    text = str(result)
    assert "decoder layers (--layer N" in text
    zeros = sum(linear.zeros for linear in result.audit.linears)
    assert f"({zeros:,} of " in text  # exact


def test_layers_that_do_not_differ_share_a_line(tmp_path: Path) -> None:
    result = secateur.inspect(save_tiny(tmp_path / "m"))
    [row] = result.layers().rows
    assert row == ("0 to 2, each", "7", "7,680", "0.0%", "", "")


def test_the_linears_of_a_layer(model: Path) -> None:
    text = str(secateur.inspect(model, layer=1))
    assert "decoder layer 1" in text
    assert "50.00%" in text
    assert "model.layers.0." not in text
    for layer in (3, -1):
        with pytest.raises(RecipeError, match=f"no decoder layer {layer}: the model has 3"):
            secateur.inspect(model, layer=layer)


def test_a_layer_of_a_gguf_file_is_expanded(tmp_path: Path, monkeypatch) -> None:
    file, folder = tmp_path / "m.gguf", save_tiny(tmp_path / "converted")
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("secateur.models.sources.convert_gguf", lambda *_, **__: folder)
    assert secateur.inspect(file, layer=1).audit.num_hidden_layers == 3


def test_an_incomplete_checkpoint_names_what_is_missing(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 of 21 matrices") as raised:
        secateur.inspect(model)
    assert raised.value.where == "model.layers.2.mlp.up_proj.weight"


def test_links_out_of_the_source_are_named(model: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "elsewhere.txt").write_text("something")
    (model / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    (model / "more.txt").symlink_to(model / "config.json")
    secateur.prune(model, output=tmp_path / "out", method="magnitude", sparsity=0.5)
    said = [r.message for r in caplog.records if "is a link" in r.message]
    assert said == [
        f"{model / 'notes.txt'} is a link to {tmp_path / 'elsewhere.txt'}: its content is copied "
        "into the result"
    ]


def test_links_of_a_hub_snapshot_are_not(tmp_path: Path, caplog) -> None:
    source = save_tiny(tmp_path / "hub" / "plain")
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    secateur.prune(snapshot, output=tmp_path / "out", method="magnitude", sparsity=0.5)
    assert "is a link" not in caplog.text
