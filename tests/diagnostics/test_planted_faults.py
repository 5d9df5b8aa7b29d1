"""Each fault that is planted is found, named and placed; nothing else is blamed for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from diagnostics.planted import Pair, edit, found, make_pair, rewrite

LINEAR = "model.layers.1.mlp.up_proj"


def test_a_healthy_pair_has_only_notes(pair: Pair) -> None:
    for with_dense in (False, True):
        diagnosis = pair.diagnose(with_dense=with_dense)
        assert {x.severity for x in diagnosis.findings} == {"note"}
        assert diagnosis.verdict.startswith("healthy")
    assert [x.layer for x in diagnosis.drift] == [0, 1, 2]
    assert set(diagnosis.bears) == {0, 1, 2}
    assert found(diagnosis, "hit-hardest")


def test_a_layer_scaled_to_nothing(pair: Pair) -> None:
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        edit(pair.pruned, f"model.layers.1.{name}.weight", lambda w: w.mul_(1e-6))
        edit(pair.pruned, f"model.layers.1.{name.replace('mlp.down', 'self_attn.o')}.bias", zero)
    diagnosis = pair.diagnose(with_dense=True)
    (collapse,) = found(diagnosis, "layer-collapse")
    assert (collapse.severity, collapse.where) == ("error", "model.layers.1")
    assert {x.where for x in found(diagnosis, "weights-vanished")} == {
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert diagnosis.drift[1].contribution < 1e-3
    alone = pair.diagnose()  # without a reference the size of the weights still tells
    assert len(found(alone, "weights-vanished")) == 2
    assert not found(alone, "layer-collapse")


@pytest.mark.parametrize(
    ("names", "factor", "kind"),
    [
        (("mlp.down_proj",), 1000.0, "layer-exploded"),
        (("self_attn.o_proj", "mlp.down_proj"), -1.0, "layer-damaged"),  # adds the opposite
    ],
)
def test_a_layer_that_adds_something_else(
    pair: Pair, names: tuple[str, ...], factor: float, kind: str
) -> None:
    for name in names:
        edit(pair.pruned, f"model.layers.1.{name}.weight", lambda w: w.mul_(factor))
    (layer,) = found(pair.diagnose(with_dense=True), kind)
    assert layer.where == "model.layers.1"


def test_a_dense_linear_that_was_to_be_pruned(pair: Pair) -> None:
    dense = load_file(pair.dense / "model.safetensors")[f"{LINEAR}.weight"]
    edit(pair.pruned, f"{LINEAR}.weight", lambda w: w.copy_(dense))
    diagnosis = pair.diagnose()
    (linear,) = found(diagnosis, "dense-linear")
    assert (linear.severity, linear.where) == ("error", LINEAR)
    assert "0.00%" in linear.evidence
    (total,) = found(diagnosis, "sparsity-not-as-claimed")  # and so the whole is not as it says
    assert total.where.endswith("manifest.json")


def test_a_dense_linear_without_records(pair: Pair) -> None:
    dense = load_file(pair.dense / "model.safetensors")[f"{LINEAR}.weight"]
    edit(pair.pruned, f"{LINEAR}.weight", lambda w: w.copy_(dense))
    shutil.rmtree(pair.pruned / "secateur")
    diagnosis = pair.diagnose()
    (linear,) = found(diagnosis, "dense-linear")
    assert (linear.severity, linear.where) == ("warning", LINEAR)
    assert found(diagnosis, "no-records")
    assert not (pair.pruned / "secateur").exists()
    (pair.pruned / "secateur").mkdir()
    assert found(pair.diagnose(), "no-records")


def test_linears_left_dense_on_purpose(tmp_path: Path) -> None:
    pair = make_pair(
        tmp_path, method="sparsegpt", sparsity=0.5, exclude=("*.layers.0.*",),
        overrides={"*.layers.2.mlp.up_proj": 0.0},
    )  # fmt: skip
    diagnosis = pair.diagnose()
    (left,) = found(diagnosis, "left-dense")
    assert left.severity == "note"
    assert left.evidence.startswith("8 linears")
    assert not diagnosis.count("warning")
    claimed = {x["name"]: x["claimed"] for x in diagnosis.to_json()["linears"]}
    assert claimed["model.layers.0.mlp.up_proj"] == 0.0
    assert claimed["model.layers.1.mlp.up_proj"] == 0.5


def test_a_kind_left_dense_everywhere(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, method="sparsegpt", sparsity=0.5, include=("*.self_attn.*",))
    shutil.rmtree(pair.pruned / "secateur")
    diagnosis = pair.diagnose()
    left = {x.where for x in found(diagnosis, "left-dense")}
    assert left == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert not diagnosis.count("warning")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad: float, pair: Pair) -> None:
    edit(pair.pruned, "model.layers.1.input_layernorm.weight", lambda w: w[3].fill_(bad))
    diagnosis = pair.diagnose(with_dense=True)
    (tensor,) = found(diagnosis, "not-finite")
    assert tensor.where == "model.layers.1.input_layernorm.weight"
    assert tensor.evidence.startswith("1 of 32 ")
    (layer,) = found(diagnosis, "hidden-states-not-finite")
    assert layer.where == "model.layers.1"
    layers = diagnosis.to_json()["layers"]
    assert layers[0]["cosine"] > 0
    assert layers[1]["cosine"] is layers[2]["cosine"] is None


def test_claims_that_are_wrong(pair: Pair) -> None:
    def claim(line: dict) -> None:
        for record in line.get("linears", []):
            if record["name"] == LINEAR:
                record.update(asked=0.75, pruned=1152, zeros=1152)

    rewrite(pair.pruned / "secateur" / "layers.jsonl", claim)
    (linear,) = found(pair.diagnose(), "sparsity-not-as-claimed")
    assert (linear.severity, linear.where) == ("error", LINEAR)
    assert "the records claim 75.00%" in linear.evidence


def test_a_total_that_is_wrong(pair: Pair) -> None:
    rewrite(
        pair.pruned / "secateur" / "manifest.json",
        lambda m: m["result"].update(decoder_sparsity=0.6),
    )
    (total,) = found(pair.diagnose(), "sparsity-not-as-claimed")
    assert total.where.endswith("manifest.json")
    assert "50.00% of the weights" in total.evidence


def test_more_zeros_than_recorded(pair: Pair) -> None:
    edit(pair.pruned, f"{LINEAR}.weight", lambda w: w[:, :16].zero_())
    (more,) = found(pair.diagnose(), "more-zeros-than-claimed")
    assert (more.severity, more.where) == ("warning", LINEAR)


def test_zeros_in_other_places_than_the_pattern_wants(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, method="sparsegpt", pattern="2:4")

    def shift(weight: torch.Tensor) -> None:
        weight.copy_(weight.roll(1, dims=1))

    edit(pair.pruned, f"{LINEAR}.weight", shift)
    (broken,) = found(pair.diagnose(), "pattern-broken")
    assert (broken.severity, broken.where) == ("error", LINEAR)
    assert "2:4" in broken.evidence


def test_a_linear_that_the_run_destroyed(pair: Pair) -> None:
    def destroy(line: dict) -> None:
        for record in line.get("linears", []):
            if record["name"] == LINEAR:
                record["error"] = 0.97

    rewrite(pair.pruned / "secateur" / "layers.jsonl", destroy)
    (collapse,) = found(pair.diagnose(), "linear-collapse")
    assert collapse.where == LINEAR
    assert "97.0%" in collapse.evidence


@pytest.mark.parametrize("name", ["layers.jsonl", "manifest.json", "recipe.yaml"])
def test_records_that_are_damaged(name: str, pair: Pair) -> None:
    (pair.pruned / "secateur" / name).write_text('{"oops": [')
    diagnosis = pair.diagnose()
    (fault,) = found(diagnosis, "records-unreadable")
    assert (fault.severity, fault.where) == ("warning", str(pair.pruned / "secateur" / name))


def test_a_compressed_folder_is_diagnosed_as_what_it_stands_for(pair: Pair, tmp_path: Path) -> None:
    for values in ("float32", "int8"):
        small = tmp_path / values
        secateur.compress(pair.pruned, output=small, values=values)
        healthy = secateur.diagnose(small, dense=pair.dense, text=pair.windows)
        assert not healthy.count("error") + healthy.count("warning"), healthy.findings
        assert (small / "secateur" / "diagnosis.json").exists()
    edit(pair.pruned, "model.layers.0.mlp.gate_proj.weight", lambda w: w[5].zero_())
    secateur.compress(pair.pruned, output=tmp_path / "small")
    (neuron,) = found(secateur.diagnose(tmp_path / "small"), "dead-neuron")
    assert neuron.where == "model.layers.0"


def zero(tensor: torch.Tensor) -> None:
    tensor.zero_()
