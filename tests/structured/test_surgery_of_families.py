"""Families beside the plain ones: cut, against the same with units switched off by hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import CUTS, close, cut_on_disk, cut_quietly, cut_twice, logits, odd
from safetensors.torch import load_file
from same_logits import assert_same_logits
from slow import slow, slow_but
from test_surgery import masked
from zoo import (
    CUT_BY_TOKEN,
    CUT_HYBRIDS,
    CUT_MIXTURES,
    CUT_SEEING,
    DENSE,
    PLAIN_MIXTURES,
    TIED_INSIDE,
    WITH_BUFFERS,
    class_of,
    config_of,
    tiny_model,
    tiny_windows,
)

from oracles.masking import narrow_stream, narrow_weights, switch_off
from secateur.engine.stream.calls import declared_layout, layouts
from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.models.skeleton import build_skeleton, quiet_transformers
from secateur.models.targets import ModelTarget
from secateur.structured.cut import Cut, Sizes, sizes_of
from secateur.structured.design import accounting
from secateur.structured.surgery import cut_checkpoint, cut_model

# --- families with a declaration and nothing unusual in their code

WALKED = {"last layers", "queries", "neurons, differing", "hidden, odd"}
"""Cuts that walk the way of another one; `test_surgery` tries them with its families."""

PLAIN = [
    *((f, cut) for f in DENSE if f not in WITH_BUFFERS for cut in CUTS if cut not in WALKED),
    *((family, "neurons, differing") for family in ("bloom", "falcon new")),
]
FEW_PLAIN = [
    *((family, "neurons, differing") for family in ("bloom", "falcon new")),
    *((family, "everything") for family in ("cohere", "exaone", "glm4", "granite_swa")),
    *((family, "everything") for family in ("nemotron", "phi", "gptj", "stablelm parallel")),
]


@pytest.mark.parametrize(("family", "name"), slow_but(FEW_PLAIN, PLAIN))
def test_families_with_nothing_unusual(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    sizes, couplings = sizes_of(model), describe(model).couplings
    cut, windows = CUTS[name](sizes), tiny_windows(2)
    if any({"queries": "groups"}.get(kind, kind) in couplings.fixed for kind in cut.kinds):
        with pytest.raises(ArchitectureError, match=r"cannot be cut"):
            cut_quietly(model, cut)
        return
    smaller, counted, _ = cut_twice(model, cut, tmp_path)
    assert close(logits(smaller, windows), masked(family, cut, windows))
    assert counted == accounting(build_skeleton(tmp_path / "source"), cut)


def test_no_position_layers_keep_their_sort() -> None:
    smaller = cut_quietly(tiny_model("smollm3"), Cut(layers=(1, 2)))
    assert smaller.config.no_rope_layers == [1, 0]
    assert [layer.self_attn.use_rope for layer in smaller.model.layers] == [1, 0]


# --- decoders with experts: heads, dense feed-forwards, channels and layers

OF_MIXTURES: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=tuple(range(1, s.layers))),
    "groups": lambda s: Cut(groups={i: odd(n) for i, n in enumerate(s.groups) if n}),
    "groups, differing": lambda s: Cut(groups={last(s.groups): (0,)}),
    "neurons": lambda s: Cut(neurons={i: odd(n) for i, n in enumerate(s.neurons) if n}),
    "hidden": lambda s: Cut(hidden=odd(s.hidden)),
}
MIXED = [
    (family, name)
    for family, kinds in CUT_MIXTURES.items()
    for name in OF_MIXTURES
    if name.partition(",")[0] in kinds
]
FEW_MIXED = [
    ("deepseek_v3", "groups"), ("deepseek_v3", "hidden"), ("qwen2_moe", "hidden"),
    ("mixtral", "layers"), ("glm4_moe_lite", "neurons"),
    ("qwen3_next", "groups"), ("lfm2_moe", "neurons"), ("deepseek_v2", "groups, differing"),
]  # fmt: skip


DELTANETS = ("qwen3_next", "qwen3_5_moe")
"""Families whose states and routers enlarge rounding."""


def last(counts: tuple[int, ...]) -> int:
    """The last layer that has such units."""
    return max(i for i, n in enumerate(counts) if n)


def with_small_epsilon(model: Any, epsilon: float = 1e-24) -> Any:
    """Values of an untrained model are small next to ε, and one ε cannot follow all norms."""
    model.config.rms_norm_eps = epsilon
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, epsilon)
    return model


def with_all_experts(model: Any) -> Any:
    """Every token goes to all experts, so that rounding sends none to another one."""
    model.config.num_experts_per_tok = model.config.num_experts
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = model.config.num_experts
    return model


@pytest.mark.parametrize(("family", "name"), slow_but(FEW_MIXED, MIXED))
def test_decoders_with_experts(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = OF_MIXTURES[name](sizes_of(model)), tiny_windows(2)
    if cut.hidden is not None:
        model = with_small_epsilon(model)
    if family in DELTANETS:
        model = with_all_experts(model)
    same = cut.hidden is None  # the stored ε of some norms is their class's own
    smaller, _, _ = cut_twice(model, cut, tmp_path, same=same, alike=False)
    if cut.hidden is None:
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


OF_EXPERTS: dict[str, Any] = {
    "experts": lambda sparse: Cut(experts=dict.fromkeys(sparse, (0, 2, 4))),
    "experts, differing": lambda sparse: Cut(experts={sparse[0]: (1, 2, 3)}),
    "without FFN": lambda sparse: Cut(neurons={sparse[0]: ()}),
    "everything": lambda sparse: Cut(
        layers=(1, 2), experts=dict.fromkeys(sparse, (1, 4)), groups={1: (0,)}, hidden=odd(32)
    ),
}
FEW_EXPERTS = {"qwen2_moe": ("experts", "everything"), "qwen3_moe": ("without FFN", "everything")}
"""Of these the default tests make some cuts: they have a shared expert, or dense layers."""


def without_experts(model: Any, kept: Any) -> None:
    """The router gives others no chance: their logits are far below."""
    for i, experts in kept.items():
        router = model.model.layers[i].mlp.gate
        gone = [e for e in range(5) if e not in experts]

        def forward(x: torch.Tensor, router: Any = router, gone: Any = gone) -> Any:
            scores = x.reshape(-1, x.shape[-1]) @ router.weight.t()
            scores[:, gone] = -torch.inf
            chances = scores.softmax(-1)
            best, index = chances.topk(2, dim=-1)
            if getattr(router, "norm_topk_prob", True):
                best = best / best.sum(-1, keepdim=True)
            return scores, best, index

        router.forward = forward


@pytest.mark.parametrize(
    ("family", "name"),
    slow_but(
        [
            (family, name)
            for family in PLAIN_MIXTURES
            for name in FEW_EXPERTS.get(family, OF_EXPERTS)
        ],
        product(PLAIN_MIXTURES, OF_EXPERTS),
    ),
)
def test_mixtures_with_fewer_experts(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    sparse = [i for i, count in enumerate(sizes_of(model).experts) if count]
    cut, windows = OF_EXPERTS[name](sparse), tiny_windows(2)
    smaller, counted, _ = cut_twice(model, cut, tmp_path, alike=False)
    assert counted == accounting(build_skeleton(tmp_path / "source"), cut)
    differing = {"without FFN", "everything"} | (
        {"experts, differing"} if len(sparse) > 1 else set()
    )
    assert counted.varied == (name in differing)
    switch_off(model, family, layers=cut.layers, groups=cut.groups, neurons=cut.neurons)
    without_experts(model, cut.experts)
    if cut.hidden is None:
        assert close(logits(smaller, windows), logits(model, windows))


def test_latent_attention_caches_as_much_with_fewer_heads() -> None:
    """A cache holds what all heads are computed from."""
    model: Any = tiny_model("deepseek_v3")
    counted = accounting(model, Cut(groups=dict.fromkeys(range(3), (0, 2))))
    assert counted.before.kv_cache_bytes_per_token == counted.after.kv_cache_bytes_per_token
    cache = model(input_ids=tiny_windows(2, 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == counted.before.kv_cache_bytes_per_token * 14
    smaller = cut_quietly(model, Cut(groups=dict.fromkeys(range(3), (0, 2))))
    attention = smaller.model.layers[0].self_attn
    assert attention.kv_b_proj.weight.shape == (2 * (8 + 16), 8)
    assert attention.q_b_proj.weight.shape == (2 * (8 + 4), 16)


def test_a_kind_that_is_fixed_is_refused_with_the_reason() -> None:
    with pytest.raises(ArchitectureError, match=r"lfm2_moe.*convolutions"):
        cut_quietly(tiny_model("lfm2_moe"), Cut(hidden=tuple(range(16))))


# --- layers of several kinds: states stay as they are

HEADS = ("qwen3_5_text", "lfm2", "bamba", "falcon_h1", "granitemoehybrid dense")
"""Those whose KV groups can be cut."""

OF_HYBRIDS: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=(1, *range(3, s.layers))),
    "last layers": lambda s: Cut(layers=tuple(range(1, s.layers))),
    "neurons": lambda s: Cut(neurons={i: odd(n) for i, n in enumerate(s.neurons) if n}),
    "one layer's neurons": lambda s: Cut(neurons={2: tuple(range(1, s.neurons[2], 3))}),
    "groups": lambda s: Cut(groups={i: (1,) for i, n in enumerate(s.groups) if n}),
}  # fmt: skip
ALIKE = ("falcon_h1", "one layer's neurons")
HYBRID = [
    (f, c)
    for f in CUT_HYBRIDS
    for c in OF_HYBRIDS
    if (c != "groups" or f in HEADS) and (f, c) != ALIKE
]
FEW_HYBRID = [
    ("qwen3_5_text", "groups"), ("lfm2", "neurons"), ("bamba", "groups"),
    ("nemotron_h dense", "layers"),
    ("falcon_h1", "last layers"), ("granitemoehybrid dense", "one layer's neurons"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), slow_but(FEW_HYBRID, HYBRID))
def test_layers_of_several_kinds(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = OF_HYBRIDS[name](sizes_of(model)), tiny_windows(2)
    smaller, _, _ = cut_twice(model, cut, tmp_path)
    switch_off(model, family, layers=cut.layers, groups=cut.groups, neurons=cut.neurons)
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


def test_what_a_hybrid_cannot_lose() -> None:
    with pytest.raises(ArchitectureError, match=r"bamba.*states"):
        cut_quietly(tiny_model("bamba"), Cut(hidden=tuple(range(16))))
    with pytest.raises(ArchitectureError, match=r"falcon_h1.*alike"):
        cut_quietly(tiny_model("falcon_h1"), Cut(neurons={2: (1, 2)}))


def test_hidden_channels_of_gated_deltanet() -> None:
    """Its states do not depend on the width of the residual stream."""
    model = with_small_epsilon(tiny_model("qwen3_5_text"), 1e-12)
    kept = tuple(range(0, 32, 2))
    smaller = cut_quietly(model, Cut(hidden=kept))
    narrow_weights(model, 32, list(kept))
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


# --- Gemma 3n and small Gemma 4: embeddings of layers, and lists of sizes

BY_TOKEN: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=tuple(range(s.layers))[-2:] if s.layers < 5 else (0, 1, 2, 4)),
    "neurons": lambda s: Cut(neurons={i: odd(s.neurons[i]) for i in range(2, s.layers)}),
    "all neurons": lambda s: Cut(neurons={i: odd(n) for i, n in enumerate(s.neurons)}),
}
TOKENS = [
    (family, name)
    for family in CUT_BY_TOKEN
    for name in BY_TOKEN
    if (family, name) != ("gemma3n_text shared", "all neurons")
]
FEW_TOKENS = [("gemma3n_text shared", "neurons"), ("gemma4_text shared", "layers")]
LISTED = ("gemma3n_text", "gemma3n_text shared")
"""Models whose class reads a number of neurons for each layer."""


@pytest.mark.parametrize(("family", "name"), slow_but(FEW_TOKENS, TOKENS))
def test_embeddings_of_layers_follow(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    cut, windows = BY_TOKEN[name](sizes_of(model)), tiny_windows(2)
    smaller, counted, _ = cut_twice(model, cut, tmp_path, alike=False)
    assert counted.varied == (name == "neurons" and family not in LISTED)
    for i, layer in enumerate(model.model.layers):
        if cut.layers is not None and i not in cut.layers:  # there are four states for each token
            layer.register_forward_hook(lambda m, args, kwargs, out: args[0], with_kwargs=True)
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


def test_what_a_model_with_embeddings_of_layers_cannot_lose() -> None:
    model = tiny_model("gemma3n_text shared")
    with pytest.raises(ArchitectureError, match=r"layer 1: .*\(activation sparsity 0.5\)"):
        cut_quietly(model, Cut(neurons={1: (1, 2)}))
    with pytest.raises(ArchitectureError, match=r"gemma3n.*late layers"):
        cut_quietly(model, Cut(groups={0: (0,)}))
    with pytest.raises(ArchitectureError, match=r"gemma4.*its router"):
        cut_quietly(tiny_model("gemma4_text small"), Cut(hidden=tuple(range(16))))


# --- models that see: the decoder is cut, the rest stays byte for byte

NAMES = ("layers", "last layers", "neurons", "groups")
SEEN = [
    (family, name)
    for family in CUT_SEEING
    for name in NAMES
    if name != "groups" or family not in TIED_INSIDE
]
FEW_SEEN = [("gemma3 vision", "layers"), ("mistral3", "groups"), ("qwen2_5_vl", "neurons")]


@pytest.mark.parametrize(("family", "name"), slow_but(FEW_SEEN, SEEN))
def test_the_decoder_of_a_model_that_sees(family: str, name: str, tmp_path: Path) -> None:
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
    assert_same_logits(logits(loaded.eval(), windows), logits(smaller, windows))
    switch_off(model, family, layers=cut.layers, groups=cut.groups, neurons=cut.neurons)
    assert close(logits(smaller, windows), logits(model, windows))


def test_heads_of_each_layer_are_a_table_where_the_class_reads_one(tmp_path: Path) -> None:
    """transformers' `per_layer_config`, which Step 3.7 reads for its heads."""
    model: Any = tiny_model("step3p7 vision")
    cut, windows = Cut(groups={0: (1,), 1: (0,)}), tiny_windows(2)
    counted, loaded = cut_on_disk(model, cut, tmp_path, varied="error")
    assert not counted.varied
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["num_key_value_heads"] == 2
    half = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert text["per_layer_config"] == {"0": half, "1": half}
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


# --- norms of queries and keys that run over heads which are cut

ALL, KEPT, SIZE = 8, 4, 8
HALF = Cut(groups={i: tuple(range(KEPT)) for i in range(3)})


def olmo(seed: int) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    return tiny_model("olmo2", seed, **sizes, num_attention_heads=ALL, num_key_value_heads=ALL)


def unread(model: Any) -> torch.Tensor:
    """The outputs with the heads that go still there, and read by nobody."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, KEPT * SIZE :] = 0.0
    return logits(model, tiny_windows())


def test_exact_where_the_heads_that_go_are_as_large_as_those_that_stay() -> None:
    model = olmo(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj"):
                weight = layer.self_attn.get_submodule(name).weight
                weight[KEPT * SIZE :] = weight[: KEPT * SIZE]
    smaller = cut_model(model, HALF)
    assert close(logits(smaller, tiny_windows()), unread(model))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_less_is_lost_than_with_the_factor_of_a_cut_stream(seed: int) -> None:
    model = olmo(seed)
    plain, other = (cut_model(model, HALF) for _ in range(2))
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.mul_(sqrt(2))
    expected = unread(model)
    errors = [
        float((logits(x, tiny_windows()) - expected).norm() / expected.norm())
        for x in (plain, other)
    ]
    assert errors[0] < 0.25
    assert errors[1] > 0.5


@pytest.mark.parametrize(
    "family",
    ["qwen3", "gemma3", "olmo2", "exaone4", "llama4", slow("hunyuan"), slow("olmo3"),
     slow("qwen3_moe"), slow("olmoe"), slow("glm4_moe"), slow("dots1"), slow("minimax_m2"),
     slow("hunyuan_v1_moe")],
)  # fmt: skip
def test_a_large_epsilon_does_not_grow_with_a_narrower_stream(family: str) -> None:
    channels = odd(32)
    model, masked = (tiny_model(family, rms_norm_eps=1e-2) for _ in range(2))
    smaller = cut_quietly(model, Cut(hidden=channels))
    narrow_weights(masked, 32, list(channels))
    found, expected = (logits(x, tiny_windows()) for x in (smaller, masked))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
