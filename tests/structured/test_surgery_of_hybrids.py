"""Decoders with layers of several kinds: cut, against the same masked; states stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import close, cut_on_disk, odd
from slow import slow_but
from test_surgery import cut_quietly, greedy, logits
from zoo import CUT_HYBRIDS, tiny_model, tiny_windows

from oracles.masking import switch_off
from secateur.engine.stream.calls import declared_layout, layouts
from secateur.engine.stream.targets import ModelTarget
from secateur.errors import ArchitectureError
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, Sizes, sizes_of

HEADS = ("qwen3_5_text", "lfm2", "bamba", "falcon_h1", "granitemoehybrid dense")
"""Those whose KV groups can be cut."""

CUTS: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=(1, *range(3, s.layers))),
    "last layers": lambda s: Cut(layers=tuple(range(1, s.layers))),
    "neurons": lambda s: Cut(neurons={i: odd(n) for i, n in enumerate(s.neurons) if n}),
    "one layer's neurons": lambda s: Cut(neurons={2: tuple(range(1, s.neurons[2], 3))}),
    "groups": lambda s: Cut(groups={i: (1,) for i, n in enumerate(s.groups) if n}),
}  # fmt: skip
ALIKE = ("falcon_h1", "one layer's neurons")
CASES = [
    (f, c) for f in CUT_HYBRIDS for c in CUTS if (c != "groups" or f in HEADS) and (f, c) != ALIKE
]
FEW = [
    ("qwen3_5_text", "groups"), ("lfm2", "neurons"), ("bamba", "groups"),
    ("nemotron_h dense", "layers"),
    ("falcon_h1", "last layers"), ("granitemoehybrid dense", "one layer's neurons"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_cut_equals_masked_and_loads_and_generates(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = CUTS[name](sizes_of(model)), tiny_windows(2)
    smaller = cut_quietly(model, cut)
    counted, loaded = cut_on_disk(model, cut, tmp_path)
    assert counted == accounting(model, cut)
    assert counted.after.parameters == sum(p.numel() for p in smaller.parameters())
    assert close(logits(loaded.eval(), windows), logits(smaller, windows))
    with_cache, without = (greedy(loaded, windows[:, :9], 4, use) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    assert close(torch.stack(with_cache.logits), torch.stack(without.logits))
    units = {kind: getattr(cut, kind) for kind in ("layers", "groups", "neurons")}
    switch_off(model, family, **units)
    assert close(logits(smaller, windows), logits(model, windows))


@pytest.mark.parametrize("family", CUT_HYBRIDS)
def test_declared_groups_are_those_that_a_forward_shows(family: str) -> None:
    target = ModelTarget(tiny_model(family))
    declared = [declared_layout(target, layer) for layer in target.layers]
    object.__setattr__(target.architecture, "groups", None)
    seen = layouts(target, 12)
    assert [[set(group) for group in one.groups] for one in declared if one] == [
        [set(group) for group in one.groups] for one in seen
    ]


def test_what_cannot_be_cut_is_refused_with_the_reason() -> None:
    with pytest.raises(ArchitectureError, match=r"bamba.*states"):
        cut_quietly(tiny_model("bamba"), Cut(hidden=tuple(range(16))))
    with pytest.raises(ArchitectureError, match=r"falcon_h1.*alike"):
        cut_quietly(tiny_model("falcon_h1"), Cut(neurons={2: (1, 2)}))


def test_hidden_channels_of_gated_deltanet() -> None:
    """Its states do not depend on the width of the residual stream."""
    model: Any = tiny_model("qwen3_5_text")
    model.config.rms_norm_eps = 1e-12
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-12)
    kept = tuple(range(0, 32, 2))
    smaller = cut_quietly(model, Cut(hidden=kept))
    gone = [c for c in range(32) if c not in kept]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                parameter[gone] = 0
    windows = tiny_windows(2)
    found, expected = logits(smaller, windows), logits(model, windows)
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max())


def test_a_hybrid_keeps_a_layer_with_attention() -> None:
    """Without one, transformers cannot count the tokens in its cache."""
    with pytest.raises(ArchitectureError, match="attention"):
        cut_quietly(tiny_model("qwen3_5_text"), Cut(layers=(0, 2)))


def test_entries_with_indices_of_layers_follow() -> None:
    smaller = cut_quietly(tiny_model("bamba"), Cut(layers=(1, 2)))
    assert smaller.config.attn_layer_indices == [0]
    smaller = cut_quietly(tiny_model("nemotron_h dense"), Cut(layers=(1, 2)))
    assert smaller.config.layers_block_type == ["full_attention", "mlp"]
    assert smaller.config.num_hidden_layers == 2
