"""Decoders with experts: heads, dense feed-forwards, channels and layers cut, against masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import close, cut_on_disk, odd
from slow import slow_but
from test_surgery import cut_quietly, greedy, logits
from zoo import CUT_MIXTURES, tiny_model, tiny_windows

from oracles.masking import narrow_stream, narrow_weights, switch_off
from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, Sizes, sizes_of

CUTS: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=tuple(range(1, s.layers))),
    "groups": lambda s: Cut(groups={i: odd(n) for i, n in enumerate(s.groups) if n}),
    "groups, differing": lambda s: Cut(groups={last(s.groups): (0,)}),
    "neurons": lambda s: Cut(neurons={i: odd(n) for i, n in enumerate(s.neurons) if n}),
    "hidden": lambda s: Cut(hidden=odd(s.hidden)),
}
CASES = [
    (family, name)
    for family, kinds in CUT_MIXTURES.items()
    for name in CUTS
    if name.partition(",")[0] in kinds
]
FEW = [
    ("deepseek_v3", "groups"), ("deepseek_v3", "hidden"), ("glm4_moe_lite", "neurons"),
    ("qwen3_next", "groups"), ("lfm2_moe", "neurons"), ("deepseek_v2", "groups, differing"),
]  # fmt: skip


DELTANETS = ("qwen3_next", "qwen3_5_moe")
"""Families whose states and routers enlarge rounding."""


def last(counts: tuple[int, ...]) -> int:
    """The last layer that has such units."""
    return max(i for i, n in enumerate(counts) if n)


def with_small_epsilon(model: Any) -> Any:
    """Values of an untrained model are small next to ε, and one ε cannot follow all norms."""
    model.config.rms_norm_eps = 1e-24
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-24)
    return model


def with_all_experts(model: Any) -> Any:
    """Every token goes to all experts, so that rounding sends none to another one."""
    model.config.num_experts_per_tok = model.config.num_experts
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = model.config.num_experts
    return model


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_cut_equals_masked_and_loads_and_generates(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = CUTS[name](sizes_of(model)), tiny_windows(2)
    if cut.hidden is not None:
        model = with_small_epsilon(model)
    if family in DELTANETS:
        model = with_all_experts(model)
    smaller = cut_quietly(model, cut)
    counted, loaded = cut_on_disk(model, cut, tmp_path)
    assert counted.removed == accounting(model, cut).removed
    assert counted.after.parameters == sum(p.numel() for p in smaller.parameters())
    if cut.hidden is None:  # the stored ε of some norms is their class's own
        assert close(logits(loaded.eval(), windows), logits(smaller, windows))
        with_cache, without = (greedy(loaded, windows[:, :9], 4, use) for use in (True, False))
        assert torch.equal(with_cache.sequences, without.sequences)
        switch_off(model, family, layers=cut.layers, groups=cut.groups, neurons=cut.neurons)
    else:
        narrow_weights(model, 32, list(cut.hidden))
        if family == "phimoe":  # the one with LayerNorms
            narrow_stream(model, 32, list(cut.hidden))
    found, expected = logits(smaller, windows), logits(model, windows)
    if name == "hidden" and family in DELTANETS:
        assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    else:
        assert close(found, expected)


def test_latent_attention_caches_as_much_with_fewer_heads() -> None:
    """A cache holds what all heads are computed from."""
    model: Any = tiny_model("deepseek_v3")
    counted = accounting(model, Cut(groups=dict.fromkeys(range(3), (0, 2))))
    assert counted.before.kv_cache_bytes_per_token == counted.after.kv_cache_bytes_per_token
    cache = model(input_ids=tiny_windows(2, 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == counted.before.kv_cache_bytes_per_token * 14
    parts = describe(model).couplings
    assert parts is not None
    smaller = cut_quietly(model, Cut(groups=dict.fromkeys(range(3), (0, 2))))
    attention = smaller.model.layers[0].self_attn
    assert attention.kv_b_proj.weight.shape == (2 * (8 + 16), 8)
    assert attention.q_b_proj.weight.shape == (2 * (8 + 4), 16)


def test_a_kind_that_is_fixed_is_refused_with_the_reason() -> None:
    with pytest.raises(ArchitectureError, match=r"lfm2_moe.*convolutions"):
        cut_quietly(tiny_model("lfm2_moe"), Cut(hidden=tuple(range(16))))
