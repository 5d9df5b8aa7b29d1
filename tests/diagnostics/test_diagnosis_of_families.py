"""All families: no false alarm after pruning, and dead units found whatever the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slow import few_families
from zoo import CONFIGS

import secateur
from diagnostics.planted import edit, found, make_pair

HEAD = 8
"""The size of a head in the zoo; 4 heads, 2 of keys and values where they are grouped."""


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_no_false_alarm(family: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family)
    pruned = pair.diagnose(with_dense=True)
    dense = secateur.diagnose(pair.dense, dense=pair.dense, text=pair.windows)
    for diagnosis in (pruned, dense):
        assert not diagnosis.count("error") + diagnosis.count("warning"), diagnosis.findings
    assert dense.findings == []
    assert dense.bears == {}
    assert all(x.relative_error == 0 and x.contribution == 1 for x in dense.drift)
    assert all(0 < x.own_error < 1 for x in pruned.drift)


def rows(start: int, stop: int):
    return lambda w: w[start:stop].zero_()


def columns(start: int, stop: int):
    return lambda w: w[:, start:stop].zero_()


DEAD_HEADS = {
    # family: (tensor, what is zeroed, the query heads that die)
    "llama": ("model.layers.1.self_attn.v_proj.weight", rows(HEAD, 2 * HEAD), "2, 3"),
    "qwen3": ("model.layers.1.self_attn.o_proj.weight", columns(0, HEAD), "0"),
    "phi3": ("model.layers.1.self_attn.qkv_proj.weight", rows(48, 56), "0, 1"),
    "gpt2": ("transformer.h.1.attn.c_attn.weight", columns(64 + 3 * HEAD, 96), "3"),
    "opt": ("model.decoder.layers.1.self_attn.v_proj.weight", rows(0, HEAD), "0"),
    "gpt_neox": ("gpt_neox.layers.1.attention.query_key_value.weight", rows(40, 48), "1"),
}


@pytest.mark.parametrize("family", DEAD_HEADS)
def test_a_dead_head(family: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family)
    name, kill, heads = DEAD_HEADS[family]
    edit(pair.pruned, name, kill)
    (dead,) = found(pair.diagnose(), "dead-head")
    assert dead.severity == "warning"
    assert dead.where == name[: name.index(".1.") + 2]
    assert dead.evidence.startswith(f"head {heads}: {len(heads.split(', '))} of 4 dead")


DEAD_NEURONS = {
    "llama": ("model.layers.1.mlp.up_proj.weight", lambda w: w[7].zero_()),
    "qwen3": ("model.layers.1.mlp.down_proj.weight", lambda w: w[:, 7].zero_()),
    "phi3": ("model.layers.1.mlp.gate_up_proj.weight", lambda w: w[48 + 7].zero_()),
    "gpt2": ("transformer.h.1.mlp.c_fc.weight", lambda w: w[:, 7].zero_()),
    "opt": ("model.decoder.layers.1.fc1.weight", lambda w: w[7].zero_()),
    "gpt_neox": ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", lambda w: w[:, 7].zero_()),
}


@pytest.mark.parametrize("family", DEAD_NEURONS)
def test_a_dead_neuron(family: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family, method="magnitude", pattern="2:4")
    name, kill = DEAD_NEURONS[family]
    edit(pair.pruned, name, kill)
    (dead,) = found(pair.diagnose(), "dead-neuron")
    assert dead.where == name[: name.index(".1.") + 2]
    assert dead.evidence.startswith("neuron 7: 1 dead")
    unread = "down" in name or "4h_to_h" in name
    assert dead.severity == ("note" if unread else "warning")  # no row of 2:4 can be all zero


def test_what_is_dead_in_the_dense_model_is_no_finding(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        for folder in (pair.dense, pair.pruned):
            edit(folder, name, lambda w: w[:HEAD].zero_())
    alone = pair.diagnose()
    assert found(alone, "dead-head")
    assert found(alone, "dead-neuron")
    assert found(alone, "dead-row")
    compared = pair.diagnose(with_dense=True)
    assert not [x for x in compared.findings if x.id in ("dead-head", "dead-neuron", "dead-row")]


def test_dead_rows_and_columns_are_counted(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, method="magnitude", pattern="2:4")
    edit(pair.pruned, "model.layers.2.self_attn.q_proj.weight", lambda w: w[3:5].zero_())
    edit(pair.pruned, "model.layers.0.self_attn.k_proj.weight", lambda w: w[:, 2].zero_())
    diagnosis = pair.diagnose()
    (row,), (column,) = found(diagnosis, "dead-row"), found(diagnosis, "dead-column")
    assert (row.severity, row.where) == ("warning", "model.layers.2.self_attn.q_proj")
    assert (column.severity, column.where) == ("note", "model.layers.0.self_attn.k_proj")
    rows = {x["name"]: x for x in diagnosis.to_json()["linears"]}
    assert rows["model.layers.2.self_attn.q_proj"]["dead_rows"] == 2
    assert rows["model.layers.0.self_attn.k_proj"]["dead_columns"] == 1
    stored = load_file(pair.pruned / "model.safetensors")
    assert torch.count_nonzero(stored["model.layers.0.self_attn.k_proj.weight"][:, 2]) == 0
