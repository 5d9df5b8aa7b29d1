"""Layers that predict further tokens, run: single steps and chains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from at_rest import save_in, stored_tensors
from further import FORMS, Predictor, save_further, start_of
from same_logits import assert_same_logits
from slow import slow_but
from tiny import tiny_llama

from secateur.errors import ArchitectureError
from secateur.models.mtp import MTP, read_mtp
from secateur.models.opening import load_whole, open_weights
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_checkpoint

QUICK = ("glm4_moe", "deepseek_v3", "qwen3_5_moe fused")


def opened(folder: Path) -> MTP:
    parent = load_whole(folder, torch.device("cpu"), dtype=torch.float32)
    return read_mtp(parent, open_weights(folder), torch.float32)


@pytest.mark.parametrize("name", slow_but(QUICK, FORMS))
def test_every_place_of_every_chain(name: str, tmp_path: Path) -> None:
    """All chains at once compute what each computes alone, from its beginning, without a cache."""
    folder = save_further(tmp_path / "m", name)
    torch.manual_seed(0)
    hidden, ids = torch.randn(2, 7, 32), torch.randint(3, 96, (2, 9))
    mtp, alone = opened(folder), Predictor(folder, name)
    found = mtp(hidden, mtp.embed(ids), 3)
    for window in range(2):
        for start in (0, 3, 6):
            rows = slice(window, window + 1)
            chain = alone.chain(hidden[rows, : start + 1], ids[rows, : start + 3], 3)
            for place, logits in enumerate(chain):
                assert_same_logits(found[place][window, start], logits)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5_moe fused"])
def test_a_layer_after_cuts_of_experts_layers_and_tokens(name: str, tmp_path: Path) -> None:
    source = save_further(tmp_path / "m", name)
    experts = (0, 2, 3, 5) if name == "glm4_moe" else (0, 2, 4)
    own = (1, 2, 3, 4) if name == "glm4_moe" else (1, 3, 4)
    cut = Cut(layers=(1, 2), experts=dict.fromkeys((1, 2), experts), predicting={0: own})
    cut_checkpoint(source, cut, tmp_path / "c")
    torch.manual_seed(0)
    hidden, ids = torch.randn(2, 7, 32), torch.randint(3, 96, (2, 7))
    mtp = opened(tmp_path / "c")
    [found] = mtp(hidden, mtp.embed(ids))
    assert_same_logits(found, Predictor(tmp_path / "c", name).logits(hidden, ids))


def test_without_an_embedding_or_a_head_of_its_own_it_has_the_parents(tmp_path: Path) -> None:
    source, start = save_further(tmp_path / "m", "glm4_moe"), start_of(FORMS["glm4_moe"])
    tensors = stored_tensors(source)
    for name, parents in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        tensors[f"{start}{name}.weight"] = tensors[f"{parents}.weight"].clone()
    save_in(source, tensors, 1)
    expected = opened(source)
    lone = {
        n: x
        for n, x in tensors.items()
        if not n.endswith(("3.embed_tokens.weight", "3.shared_head.head.weight"))
    }
    save_in(source, lone, 1)
    hidden, ids = torch.randn(1, 5, 32), torch.randint(3, 96, (1, 5))
    [[one], [other]] = (mtp(hidden, mtp.embed(ids)) for mtp in (opened(source), expected))
    assert torch.equal(one, other)


def test_checkpoints_without_such_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="MTP"):
        opened(tiny_llama(tmp_path / "m"))


def test_a_layer_of_another_form_is_refused(tmp_path: Path) -> None:
    source = save_further(tmp_path / "m", "glm4_moe")
    odd = {"model.layers.3.self_attn.sinks": torch.zeros(4)}
    save_in(source, stored_tensors(source) | odd, 1)
    with pytest.raises(ArchitectureError, match="same names"):
        opened(source)
