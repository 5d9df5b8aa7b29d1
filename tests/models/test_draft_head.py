"""A draft head computes the formula of EAGLE-3, and its folder comes back as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from secateur.errors import CheckpointError
from secateur.models.draft_head import (
    DraftHead,
    head_config,
    read_head,
    tapped_layers,
    write_head,
)

IDS = torch.tensor([1, 5, 7, 40])
HIDDEN, HEADS, GROUPS, HEAD = 32, 4, 2, 8


def made() -> DraftHead:
    """A random head of a parent of four layers, with norms that do something."""
    torch.manual_seed(0)
    parent = LlamaConfig(
        vocab_size=60, hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    head = DraftHead(head_config(parent), tapped_layers(4), IDS)
    for name, parameter in head.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return head.eval()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean() + 1e-6).sqrt()


def rotated(x: Tensor, position: int) -> Tensor:
    """One head, by its position."""
    out = x.clone()
    for i in range(HEAD // 2):
        angle = position * 500.0 ** (-2 * i / HEAD)
        one, other = x[i], x[i + HEAD // 2]
        out[i] = one * math.cos(angle) - other * math.sin(angle)
        out[i + HEAD // 2] = other * math.cos(angle) + one * math.sin(angle)
    return out


def oracle(
    w: dict[str, Tensor], states: Tensor, embedded: Tensor, base: int, places: int
) -> Tensor:
    """The logits of one chain after position `base`, token by token, as the paper writes them."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    found, h = [], torch.empty(0)
    for position in range(base + places):
        if position <= base:
            h = w["fc.weight"] @ states[position]
        read = torch.cat([
            norm(embedded[position], w["layers.0.input_layernorm.weight"]),
            norm(h, w["layers.0.hidden_norm.weight"]),
        ])  # fmt: skip
        q, k, v = ((w[f"layers.0.self_attn.{x}_proj.weight"] @ read).view(-1, HEAD) for x in "qkv")
        keys.append(torch.stack([rotated(x, position) for x in k]))
        values.append(v)
        mixed = []
        for number in range(HEADS):
            group, own = number * GROUPS // HEADS, rotated(q[number], position)
            scores = torch.stack([own @ x[group] / math.sqrt(HEAD) for x in keys])
            shares = scores.exp() / scores.exp().sum()
            mixed.append(sum(s * x[group] for s, x in zip(shares, values, strict=True)))
        h1 = h + w["layers.0.self_attn.o_proj.weight"] @ torch.cat(mixed)
        x = norm(h1, w["layers.0.post_attention_layernorm.weight"])
        gate, up = (w[f"layers.0.mlp.{n}_proj.weight"] @ x for n in ("gate", "up"))
        h = h1 + w["layers.0.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
        if position >= base:
            found.append(w["lm_head.weight"] @ norm(h, w["norm.weight"]))
    return torch.stack(found)


def test_it_computes_the_formula() -> None:
    head, places = made(), 3
    states, embedded = torch.randn(2, 6, 3 * HIDDEN), torch.randn(2, 8, HIDDEN)
    with torch.no_grad():
        got = torch.stack(head(states, embedded, places), 2)  # [batch, tokens, places, drafted]
    weights = {name: x.detach() for name, x in head.state_dict().items()}
    for window in range(2):
        for base in (0, 2, 5):
            expected = oracle(weights, states[window], embedded[window], base, places)
            torch.testing.assert_close(got[window, base], expected, rtol=1e-4, atol=1e-5)


def test_fewer_tokens_are_rows_of_the_same_head() -> None:
    head = made()
    states, embedded = torch.randn(1, 4, 3 * HIDDEN), torch.randn(1, 4, HIDDEN)
    with torch.no_grad():
        [whole], [some] = (x(states, embedded) for x in (head, head.proposing(IDS[[0, 3]])))
    torch.testing.assert_close(some, whole[..., [0, 3]])
    assert torch.equal(head.ids, IDS)


@pytest.mark.parametrize("layers", range(2, 40))
def test_states_are_those_of_three_layers(layers: int) -> None:
    taps = tapped_layers(layers)
    assert 0 <= taps[0] < taps[1] < taps[2] <= layers
    if layers >= 8:  # as vLLM chooses them
        assert taps == (2, layers // 2, layers - 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    head = made()
    head.values = "int4"
    write_head(tmp_path, head, "PARENT", "LlamaForCausalLM", 4)
    return tmp_path


def test_a_folder_comes_back(folder: Path) -> None:
    head, again = made(), read_head(folder)
    assert (again.taps, again.values) == (head.taps, "int4")
    assert torch.equal(again.ids, IDS)
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16())
    tensors = load_file(folder / "model.safetensors")
    assert (torch.arange(4) + tensors["d2t"]).tolist() == IDS.tolist()
    assert tensors["t2d"].nonzero().flatten().tolist() == IDS.tolist()


def test_a_folder_that_speculators_may_have_written(folder: Path) -> None:
    """Of all tokens, without maps, and with the parent's embeddings."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["d2t"], tensors["t2d"]
    tensors["embed_tokens.weight"] = torch.zeros(60, HIDDEN)
    tensors["lm_head.weight"] = torch.zeros(60, HIDDEN)
    save_file(tensors, file)
    edit(folder, draft_vocab_size=60)
    assert torch.equal(read_head(folder).ids, torch.arange(60))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_before_residual": True},
        {"fc_norm": True},
        {"draft_vocab_size": 5},
        {"draft_vocab_size": "many"},
        {"transformer_layer_config": {}},
        {"transformer_layer_config": None},
        {"eagle_aux_hidden_state_layer_ids": None},
    ],
    ids=str,
)
def test_other_heads_and_damaged_ones_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        read_head(folder)
    assert str(folder) in str(error.value)


def test_a_missing_or_cut_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        read_head(folder)
    file.unlink()
    with pytest.raises(CheckpointError):
        read_head(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError):
        read_head(folder)
