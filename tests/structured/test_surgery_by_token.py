"""Gemma 3n and small Gemma 4, cut: embeddings of layers follow the layers, and lists of sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import close, cut_on_disk, odd
from slow import slow_but
from test_surgery import cut_quietly, greedy, logits
from zoo import CUT_BY_TOKEN, tiny_model, tiny_windows

from oracles.masking import switch_off
from secateur.errors import ArchitectureError
from secateur.models.skeleton import quiet_transformers
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, Sizes, sizes_of
from secateur.structured.surgery import cut_checkpoint

CUTS: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=tuple(range(s.layers))[-2:] if s.layers < 5 else (0, 1, 2, 4)),
    "neurons": lambda s: Cut(neurons={i: odd(s.neurons[i]) for i in range(2, s.layers)}),
    "all neurons": lambda s: Cut(neurons={i: odd(n) for i, n in enumerate(s.neurons)}),
}
CASES = [
    (family, name)
    for family in CUT_BY_TOKEN
    for name in CUTS
    if (family, name) != ("gemma3n_text shared", "all neurons")
]
FEW = [("gemma3n_text shared", "neurons"), ("gemma4_text shared", "layers")]
LISTED = ("gemma3n_text", "gemma3n_text shared")
"""Models whose class reads a number of neurons for each layer."""


def without_layers(model: Any, family: str, gone: list[int]) -> None:
    """The hidden states pass unchanged, also where there are four for each token."""
    for i in gone:
        layer = model.model.layers[i]
        layer.register_forward_hook(lambda m, args, kwargs, out: args[0], with_kwargs=True)


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_cut_equals_masked_and_loads_and_generates(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = CUTS[name](sizes_of(model)), tiny_windows(2)
    smaller = cut_quietly(model, cut)
    counted, loaded = cut_on_disk(model, cut, tmp_path)
    assert counted == accounting(model, cut)
    assert counted.after.parameters == sum(p.numel() for p in smaller.parameters())
    assert counted.varied == (name == "neurons" and family not in LISTED)
    assert close(logits(loaded.eval(), windows), logits(smaller, windows))
    with_cache, without = (greedy(loaded, windows[:, :9], 4, use) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    if cut.layers is not None:
        without_layers(
            model, family, [i for i in range(len(model.model.layers)) if i not in cut.layers]
        )
    switch_off(model, family, neurons=cut.neurons)
    assert close(logits(smaller, windows), logits(model, windows))


def test_a_number_of_neurons_for_each_layer_is_a_list_where_the_class_reads_one(
    tmp_path: Path,
) -> None:
    with quiet_transformers():
        tiny_model("gemma3n_text").save_pretrained(tmp_path / "source")
    cut = Cut(neurons={0: (1, 2, 5, 7), 2: tuple(range(20))})
    counted = cut_checkpoint(tmp_path / "source", cut, tmp_path / "out")
    assert not counted.varied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == [4, 48, 20]
    assert "per_layer_config" not in config
    assert config["architectures"] == ["Gemma3nForCausalLM"]


def test_embeddings_of_a_removed_layer_are_removed() -> None:
    model: Any = tiny_model("gemma4_text small")
    smaller = cut_quietly(model, Cut(layers=(0, 2)))
    for name, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        before = getattr(model.model, name).weight.unflatten(axis, (3, 8))
        after = getattr(smaller.model, name).weight.unflatten(axis, (2, 8))
        assert torch.equal(after, before.index_select(axis, torch.tensor([0, 2]))), name


def test_a_removed_layer_whose_keys_others_read_is_refused() -> None:
    """Layer 2 computes the keys of the local layer 3, and layer 0 would take its place."""
    with pytest.raises(ArchitectureError, match="store_full_length_kv of layer 0 is False"):
        cut_quietly(tiny_model("gemma4_text shared"), Cut(layers=(0, 1, 3, 4)))


def test_what_cannot_be_cut_is_refused_with_the_reason() -> None:
    model = tiny_model("gemma3n_text shared")
    with pytest.raises(ArchitectureError, match=r"layer 1: .*\(activation sparsity 0.5\)"):
        cut_quietly(model, Cut(neurons={1: (1, 2)}))
    with pytest.raises(ArchitectureError, match=r"gemma3n.*late layers"):
        cut_quietly(model, Cut(groups={0: (0,)}))
    with pytest.raises(ArchitectureError, match=r"gemma4.*its router"):
        cut_quietly(tiny_model("gemma4_text small"), Cut(hidden=tuple(range(16))))
