"""Cut models of every family, against the same units switched off by hooks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import CUTS, TIED_TO_HEADS, assert_generates, close, cut_quietly, is_plain, logits
from same_logits import assert_same_logits
from slow import FEW_FAMILIES, few_families, slow_but
from zoo import CONFIGS, tiny_model, tiny_windows

from oracles.masking import switch_off
from secateur.errors import ArchitectureError
from secateur.models.skeleton import quiet_transformers
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.design import accounting
from secateur.structured.surgery import VariedSizesWarning, cut_model

DECLARED = [family for family in CONFIGS if family != "generic"]
CASES = [
    (family, name)
    for family in DECLARED
    for name in CUTS
    if family not in TIED_TO_HEADS or name != "queries"
]
FEW = [(family, name) for family, name in CASES if family in FEW_FAMILIES or name == "everything"]


def masked(family: str, cut: Cut, windows: torch.Tensor) -> torch.Tensor:
    model = tiny_model(family)
    units = {kind: getattr(cut, kind) for kind in ("groups", "queries", "neurons")}
    switch_off(model, family, layers=cut.layers, hidden=cut.hidden, **units)
    return logits(model, windows)


@functools.cache
def cut_of(family: str, name: str) -> tuple[Any, Cut, Any]:
    """A model, a cut and the cut model: not to be changed."""
    model = tiny_model(family)
    cut = CUTS[name](sizes_of(model))
    return model, cut, cut_quietly(model, cut)


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_cut_equals_masked_and_loads_and_generates(family: str, name: str, tmp_path: Path) -> None:
    (model, cut, smaller), windows = cut_of(family, name), tiny_windows(2)
    expected = masked(family, cut, windows)
    assert close(logits(smaller, windows), expected)
    assert smaller.config.model_type == (
        model.config.model_type if is_plain(family, name) else "secateur_varied"
    )
    with quiet_transformers():
        smaller.save_pretrained(tmp_path)
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert_same_logits(logits(loaded.eval(), windows), logits(smaller, windows))
    assert_generates(loaded, windows[:, :9])  # longer than the sliding windows


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_accounting_is_exact(family: str, name: str) -> None:
    (model, cut, smaller), windows = cut_of(family, name), tiny_windows(2, 7)
    found = accounting(model, cut)
    for counted, one in ((found.before, model), (found.after, smaller)):
        parameters = dict(one.named_parameters())
        assert counted.parameters == sum(p.numel() for p in parameters.values())
        layers = [p for n, p in parameters.items() if ".layers." in n or ".h." in n]
        assert counted.decoder == sum(p.numel() for p in layers)
        assert counted.file_bytes == sum(p.nbytes for p in parameters.values())
        assert counted.other == counted.experts == 0
        cache = one(input_ids=windows, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert counted.kv_cache_bytes_per_token * windows.numel() == held
    assert found.varied != is_plain(family, name)
    assert 0 < found.removed < 1
    assert 0 < found.decoder_removed < 1


@pytest.mark.parametrize("family", few_families(DECLARED))
def test_a_varied_model_can_be_cut_again(family: str) -> None:
    model, windows = tiny_model(family), tiny_windows(2)
    first = CUTS["without attention"](sizes_of(model))
    second = Cut(groups={1: (0,)}, neurons={0: (3, 4)}, hidden=tuple(range(5, 30)))
    twice = cut_quietly(cut_quietly(model, first), second)
    both = Cut(groups={0: (), 1: (first.groups[1][0],)}, neurons={0: (3, 4)}, hidden=second.hidden)
    assert close(logits(twice, windows), masked(family, both, windows))
    back = Cut(layers=(2,))
    plain = cut_model(cut_quietly(model, first), back)
    assert type(plain) is type(model)
    assert close(logits(plain, windows), masked(family, back, windows))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "opt"])
def test_tied_embeddings_stay_tied(family: str) -> None:
    model = tiny_model(family)
    for name in ("hidden", "everything"):
        smaller = cut_quietly(model, CUTS[name](sizes_of(model)))
        head, embedding = smaller.get_output_embeddings(), smaller.get_input_embeddings()
        assert head.weight is embedding.weight
        assert head.in_features == embedding.embedding_dim == embedding.weight.shape[1]


def test_layer_types_follow_their_layers() -> None:
    model = tiny_model("gemma3")
    assert cut_model(model, Cut(layers=(1, 2))).config.layer_types == [
        "full_attention",
        "sliding_attention",
    ]
    varied = cut_quietly(model, Cut(layers=(1,), groups={1: (0,)}, neurons={1: ()}))
    assert varied.config.layer_types == ["full_attention"]


def test_the_cut_model_leaves_the_other_alone() -> None:
    model, windows = tiny_model("qwen3"), tiny_windows(2)
    before = logits(model, windows)
    cut_quietly(model, CUTS["everything"](sizes_of(model)))
    assert torch.equal(logits(model, windows), before)


def test_of_an_undeclared_family_layers_can_be_cut_and_no_more() -> None:
    model, windows = tiny_model("generic"), tiny_windows(2)
    cut = Cut(layers=(0, 2))
    assert close(logits(cut_model(model, cut), windows), masked("generic", cut, windows))
    with pytest.raises(ArchitectureError, match="only whole layers"):
        cut_model(model, Cut(neurons={0: (1,)}))


def test_different_sizes_are_warned_about() -> None:
    with pytest.warns(VariedSizesWarning, match="trust_remote_code"):
        cut_model(tiny_model("llama"), Cut(neurons={0: (1,)}))
