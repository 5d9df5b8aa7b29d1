"""The decoder inside a model that sees is cut; the rest stays byte for byte."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import CUTS, close, cut_on_disk
from safetensors.torch import load_file
from same_logits import assert_same_logits
from slow import slow_but
from test_surgery import cut_quietly, logits
from zoo import CUT_SEEING, TIED_INSIDE, class_of, config_of, tiny_model, tiny_windows

from oracles.masking import switch_off
from secateur.errors import ArchitectureError
from secateur.models.skeleton import quiet_transformers
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint

NAMES = ("layers", "last layers", "neurons", "groups")
CASES = [
    (family, name)
    for family in CUT_SEEING
    for name in NAMES
    if name != "groups" or family not in TIED_INSIDE
]
FEW = [("gemma3 vision", "layers"), ("mistral3", "groups"), ("qwen2_5_vl", "neurons")]


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_cut_equals_masked_and_the_rest_stays(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = CUTS[name](sizes_of(model)), tiny_windows(2)
    smaller = cut_quietly(model, cut)
    counted, loaded = cut_on_disk(model, cut, tmp_path, varied="error")
    assert counted == accounting(model, cut)
    assert type(loaded) is type(model)
    before, after = (
        load_file(tmp_path / which / "model.safetensors") for which in ("source", "out")
    )
    others = [n for n in before if "vision" in n or "visual" in n or "connector" in n]
    assert len(others) > 4
    assert all(torch.equal(before[n], after[n]) for n in others)
    units = {kind: getattr(cut, kind) for kind in ("layers", "groups", "neurons")}
    assert_same_logits(logits(loaded.eval(), windows), logits(smaller, windows))
    switch_off(model, family, **units)
    assert close(logits(smaller, windows), logits(model, windows))


def test_heads_of_each_layer_are_a_table_where_the_class_reads_one(tmp_path: Path) -> None:
    """transformers' `per_layer_config`, which Step 3.7 reads for its heads."""
    model: Any = tiny_model("step3p7 vision")
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    cut, windows = Cut(groups={0: (1,), 1: (0,)}), tiny_windows(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VariedSizesWarning)
        counted = cut_checkpoint(tmp_path / "source", cut, tmp_path / "out")
    assert not counted.varied
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["num_key_value_heads"] == 2
    half = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert text["per_layer_config"] == {"0": half, "1": half}
    with quiet_transformers():
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    switch_off(model, "step3p7 vision", groups=cut.groups)
    assert close(logits(loaded.eval(), windows), logits(model, windows))
    again = Cut(layers=(1, 2), groups={2: (0,)})
    twice = cut_quietly(loaded, again)  # a table is read, and its layers are numbered anew
    assert twice.config.text_config.to_dict()["per_layer_config"] == {}
    assert [x.self_attn.num_heads for x in twice.model.language_model.layers] == [2, 2]


def test_layers_with_other_numbers_of_heads_in_a_group_keep_them() -> None:
    config = config_of("step3p7 vision")
    entries = config.to_dict()
    entries["text_config"] |= {"per_layer_config": {"0": {"num_attention_heads": 6}}}
    model = class_of(config).from_config(type(config).from_dict(entries))
    with pytest.raises(ArchitectureError, match="2 or 3"):
        cut_quietly(model, Cut(groups={0: (1,)}))


def test_what_a_model_that_sees_cannot_lose() -> None:
    model = tiny_model("qwen3_vl")
    with pytest.raises(ArchitectureError, match="decoder"):
        cut_quietly(model, Cut(neurons={0: (1, 2)}))
    with pytest.raises(ArchitectureError, match="not declared"):
        cut_quietly(model, Cut(hidden=tuple(range(16))))
