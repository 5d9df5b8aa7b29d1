"""Cuts of checkpoints with layers that predict further tokens: they follow, or are left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from at_rest import described, raw, rounded_to_float8, save_in, stored_tensors, text_file
from further import FORMS, Predictor, own_tensors, renamed, save_further, start_of
from same_logits import assert_same_logits
from slow import slow_but
from torch import Tensor

import secateur
from secateur.models.inventory import FurtherLayers
from secateur.models.opening import load_whole
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_checkpoint

CPU = torch.device("cpu")
QUICK = ("glm4_moe", "minimax_m2", "qwen3_5_moe fused")
ALL = slow_but(QUICK, FORMS)


def kept_of(name: str) -> dict[str, Any]:
    """Experts that stay in the decoder layers, and others in the layer for further tokens."""
    counts = {"glm4_moe": (1, 2), "deepseek_v3": (1, 2)}
    if name in counts:  # groups of three
        return {"experts": dict.fromkeys((1, 2), (0, 2, 3, 5)), "predicting": {0: (1, 2, 3, 4)}}
    return {"experts": dict.fromkeys(range(3), (0, 2, 4)), "predicting": {0: (1, 3, 4)}}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states of two windows, and the tokens after each position."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 7, 32, generator=generator)
    return hidden, torch.randint(3, 96, (2, 7), generator=generator)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("name", ALL)
def test_experts_of_the_layer_are_removed(name: str, tmp_path: Path) -> None:
    """What stays is computed as in the uncut layer whose router does not choose the others."""
    source, form = save_further(tmp_path / "m", name), FORMS[name]
    kept = kept_of(name)
    cut_checkpoint(source, Cut(**kept), tmp_path / "c")
    chosen = kept["predicting"][0]
    before, after = stored_tensors(source), stored_tensors(tmp_path / "c")
    layer, linear = start_of(form), ".w1." if name == "minimax_m2" else ".gate_proj."
    for own, shape in own_tensors(form).items():
        assert after[own].shape == shape
        assert torch.equal(after[own], before[own])
    there = sorted(n for n in after if n.startswith(layer) and ".experts." in n and linear in n)
    assert len(there) == (0 if form.fused else len(chosen))
    for new, number in enumerate(there):
        old = number.replace(f".experts.{new}.", f".experts.{chosen[new]}.")
        assert torch.equal(after[number], before[old])
    router = next(n for n in after if n.startswith(layer) and n.endswith(".gate.weight"))
    assert torch.equal(after[router], before[router][list(chosen)])
    assert config_of(tmp_path / "c")[form.counted] == 1
    off = {*range(before[router].shape[0])} - {*chosen}
    expected = Predictor(source, name, off).logits(*inputs())
    assert_same_logits(Predictor(tmp_path / "c", name).logits(*inputs()), expected)
    load_whole(tmp_path / "c", CPU)


@pytest.mark.parametrize("name", ALL)
def test_the_layer_stays_whole_behind_fewer_layers(name: str, tmp_path: Path) -> None:
    source, form = save_further(tmp_path / "m", name, shards=3), FORMS[name]
    cut_checkpoint(source, Cut(layers=(1, 2)), tmp_path / "c")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "c")
    own = {n: x for n, x in before.items() if n.startswith((start_of(form), "mtp."))}
    assert {n for n in after if n.startswith((start_of(form, 2), "mtp."))} == {
        renamed(n, form, 2) for n in own
    }
    assert all(torch.equal(after[renamed(n, form, 2)], x) for n, x in own.items())
    assert config_of(tmp_path / "c")[form.counted] == 1
    expected = Predictor(source, name).logits(*inputs())
    assert torch.equal(Predictor(tmp_path / "c", name).logits(*inputs()), expected)
    load_whole(tmp_path / "c", CPU)


LEFT: list[tuple[str, Cut]] = [
    ("input_layernorm", Cut(hidden=tuple(range(24)))),
    ("k_proj", Cut(groups=dict.fromkeys(range(3), (1,)))),
    ("gate.e_score", Cut(experts=dict.fromkeys((1, 2), (0, 2, 3, 5)))),
    ("gate.e_score", Cut(experts=dict.fromkeys((1, 2), (0, 2, 3, 5)), predicting={0: (0, 3)})),
]


@pytest.mark.parametrize(("reason", "cut"), LEFT)
def test_a_layer_that_cannot_follow_is_left_out(
    reason: str, cut: Cut, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine would read its tensors in the sizes of the cut decoder layers."""
    source = save_further(tmp_path / "m", "glm4_moe")
    cut_checkpoint(source, cut, tmp_path / "c")
    count = sum(n.startswith("model.layers.3.") for n in stored_tensors(source))
    assert f"{count} stored tensors" in caplog.text
    assert reason in caplog.text.rpartition(";")[2]
    assert not any(n.startswith("model.layers.3.") for n in stored_tensors(tmp_path / "c"))
    assert config_of(tmp_path / "c")["num_nextn_predict_layers"] == 0
    load_whole(tmp_path / "c", CPU)


def test_float8_keeps_its_bytes(tmp_path: Path) -> None:
    """In three files; scales and lists of modules follow the layer and its experts."""
    source = save_further(tmp_path / "m", "glm4_moe", dtype=torch.bfloat16)
    scale = {"model.layers.3.mlp.experts.2.up_proj.activation_scale": torch.tensor(2.0)}
    save_in(source, stored_tensors(source) | scale, 1)
    rounded_to_float8(source, shards=3)
    chosen, decoder = (1, 2, 3, 4), (0, 2, 3, 5)
    cut = Cut(layers=(0, 2), experts={2: decoder}, predicting={0: chosen})
    cut_checkpoint(source, cut, tmp_path / "c")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "c")
    checked = 0
    for name, tensor in after.items():
        if not name.startswith("model.layers.2."):
            continue
        old = name.replace("model.layers.2.", "model.layers.3.")
        for new, expert in reversed([*enumerate(chosen)]):
            old = old.replace(f".experts.{new}.", f".experts.{expert}.")
        was = before[old][list(chosen)] if ".mlp.gate." in name else before[old]
        assert torch.equal(raw(tensor), raw(was)), name
        checked += tensor.dtype == torch.float8_e4m3fn
    assert checked == 1 + 4 + 3 + 3 * 4
    assert "model.layers.2.mlp.experts.1.up_proj.activation_scale" in after
    layers = [f"model.layers.{n}." for n in (1, 2)]
    spared = ["embed_tokens", "mlp.gate", "shared_head.head"]
    assert set(described(tmp_path / "c")["modules_to_not_convert"]) == {
        "lm_head", f"{layers[0]}mlp.gate", *(layers[1] + name for name in spared),
    }  # fmt: skip
    left = Cut(layers=(0, 2), experts={2: decoder})
    cut_checkpoint(source, left, tmp_path / "d")
    assert not any(n.startswith("model.layers.2.") for n in stored_tensors(tmp_path / "d"))
    load_whole(tmp_path / "c", CPU)


def test_the_verb_chooses_experts_by_their_weights(tmp_path: Path) -> None:
    """Those of one scale have the least score: root of the mean square by the mean magnitude."""
    source = save_further(tmp_path / "m", "glm4_moe")
    tensors = stored_tensors(source)
    for name, weight in tensors.items():  # one of each group has equal magnitudes
        if re.match(r"model\.layers\.3\.mlp\.experts\.[15]\.", name):
            weight.copy_(weight.sign())
    save_in(source, tensors, 2)
    made = secateur.structure(
        source, output=tmp_path / "s", calibration=text_file(tmp_path), windows=2,
        sequence_length=24, keep_layers=2, experts=4, experts_by="frequency", effort="fast",
    )  # fmt: skip
    (step,) = json.loads((tmp_path / "s/secateur/steps.json").read_text())[1:]
    assert step["cut"]["predicting"] == {"0": [0, 2, 3, 4]}
    after = stored_tensors(tmp_path / "s")
    assert made.manifest.result.file_bytes == sum(x.nbytes for x in after.values())
    expected = Predictor(source, "glm4_moe", {1, 5}).logits(*inputs())
    assert_same_logits(Predictor(tmp_path / "s", "glm4_moe").logits(*inputs()), expected)


def test_a_pruned_model_keeps_the_layer_as_it_is(tmp_path: Path) -> None:
    source = save_further(tmp_path / "m", "glm4_moe")
    secateur.prune(source, output=tmp_path / "p", method="magnitude", sparsity=0.5)
    before, after = stored_tensors(source), stored_tensors(tmp_path / "p")
    own = [n for n in before if n.startswith("model.layers.3.")]
    assert all(torch.equal(after[name], before[name]) for name in own)
    left = secateur.inspect(tmp_path / "p").audit.left
    (entry,) = (x for x in left if x.reason.startswith("stored, but no part"))
    assert entry.weights == sum(before[n].numel() for n in own if before[n].ndim > 1)


NAMES: dict[str, tuple[int, str] | None] = {
    "model.layers.3.eh_proj.weight": (0, "eh_proj.weight"),
    "layers.4.mlp.gate": (1, "mlp.gate"),
    "model.layers.2.mlp.gate.weight": None,
    "model.vision.layers.7.mlp.fc.weight": None,
    "mtp.layers.1.mixer.gate.weight": (1, "mixer.gate.weight"),
    "model.mtp_layers.0.input_proj.weight": (0, "input_proj.weight"),
    "model.mtp_block.2.mlp.gate.weight": (2, "mlp.gate.weight"),
    "mtp.0.attn.wq_a.weight": (0, "attn.wq_a.weight"),
    "mtp.fc.weight": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_published_checkpoints(name: str) -> None:
    layers = FurtherLayers("layers", 3, frozenset({"vision"}))
    found = layers.place(name)
    assert (found and (found.layer, found.inner)) == NAMES[name]
    assert layers.holds(name) == ("mtp" in name or found is not None)
