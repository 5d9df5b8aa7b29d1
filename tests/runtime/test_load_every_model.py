"""Every model of the zoo, compressed and loaded: it computes what the dense one computes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slow import slow_but
from tiny import saved
from with_kernels import needs_kernels
from zoo import NOT_LOADED, NOT_RUN, ZOO, class_of, config_of, matrices, tiny_model, tiny_windows

import secateur
from families_page import OUTSIDE
from secateur.errors import SecateurError
from secateur.runtime.decode import Decoder, SlotDecoder, Token
from secateur.runtime.kernels.linear import PackedLinear
from secateur.runtime.layer_forms import FORMS, why_not

IDS = tiny_windows(2, 9)
DECODER = re.compile(r"^(?!.*(?:vision|visual|audio)).*\b(?:layers|h)\.\d+\.")
"""The names of what is in decoder layers."""

FEW = ("llama", "mamba", "gemma3n_text shared", "gemma3 vision", "deepseek_v3", "gpt_oss")
TYPES = [name for name in ZOO if config_of(name).model_type in FORMS]
"""Models of the types that one call for each token decodes."""


@torch.no_grad()
def half_zero(name: str) -> Any:
    """A tiny model with zeros in half of the places of its decoder's matrices."""
    try:
        model: Any = tiny_model(name)
    except ImportError as missing:
        pytest.skip(f"{name}: {str(missing).strip().splitlines()[0]}")
    found = {path: module.weight for path, module in matrices(model).items()}
    found |= {n: p for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n}
    for path, weight in found.items():
        if DECODER.match(path):
            weight[torch.rand(weight.shape) < 0.5] = 0
    return model


@pytest.mark.parametrize("name", slow_but(FEW, ZOO))
def test_packed_models_compute_what_dense_ones_compute(name: str, tmp_path: Path) -> None:
    model = half_zero(name)
    secateur.compress(saved(model, tmp_path / "dense"), output=tmp_path / "packed", values="keep")
    if name in NOT_LOADED:
        with pytest.raises(SecateurError, match=NOT_LOADED[name]):
            secateur.load(tmp_path / "packed")
        return
    packed: Any = secateur.load(tmp_path / "packed")
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) >= 6
    if name in NOT_RUN:
        return
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        found = packed(input_ids=IDS, use_cache=False).logits
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", slow_but((*FEW, "llama4", "gemma4 vision small"), ZOO))
def test_embedding_and_head_of_integers(name: str, tmp_path: Path) -> None:
    """Some models read device, dtype or rows of these weights in their own code."""
    model = half_zero(name)
    packed = tmp_path / "packed"
    options = {"values": "int8", "embeddings": "int8"}
    secateur.compress(saved(model, tmp_path / "dense"), output=packed, **options)
    if name in NOT_LOADED or name in NOT_RUN:
        return
    with torch.no_grad():
        found, expected = (
            secateur.load(packed, expand=dense)(input_ids=IDS, use_cache=False).logits.float()
            for dense in (False, True)
        )
    assert float((found - expected).norm() / expected.norm()) < 0.3


def with_wide_heads(name: str) -> Any:
    """A tiny model of random weights whose heads are 16 wide, as the kernels need it."""
    config = config_of(name)
    if getattr(config, "head_dim", None):
        config.head_dim = 16
    if not getattr(config, "head_dim", None) or config.model_type == "helium":
        config.hidden_size = 64
    if hasattr(config, "n_group"):
        config.n_group = config.topk_group = 1
    torch.manual_seed(0)
    model = class_of(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases and sinks, which are ones or zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:  # so that activations, caps and routers leave the range where they are linear
                parameter.mul_(3)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer), alpha=0.3)
    return model


@needs_kernels
@pytest.mark.parametrize("name", TYPES)
def test_one_call_computes_what_the_model_computes(name: str, tmp_path: Path) -> None:
    """A token in float32; a prompt in int8, on tokens that leave sliding windows."""
    model = with_wide_heads(name)
    ids = tiny_windows(1, 24)[0]
    assert why_not(model) is None
    decoder = Decoder(model, 24)
    decoder.prefill(ids[:5])
    steps = torch.stack([decoder.step(int(token)) for token in ids[5:]])
    with torch.no_grad():
        expected = model(input_ids=ids[None], use_cache=False).logits[0, 5:]
    assert float((steps - expected).abs().max()) <= 1e-4 * float(expected.abs().max())

    secateur.compress(saved(model, tmp_path / "dense"), output=tmp_path / "packed", values="int8")
    packed = secateur.load(tmp_path / "packed", dtype=torch.float32)
    slots = SlotDecoder(packed, 24)
    prompt = slots.read(0, ids, every=True)
    slots.rewind(0)
    alone = [slots.step([Token(0, place, int(token))]) for place, token in enumerate(ids)]
    with torch.no_grad():
        expected = packed(input_ids=ids[None], use_cache=False).logits[0]
    for found in (prompt, torch.cat(alone)):
        assert float((found - expected).norm() / expected.norm()) < 0.03


LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 32,
}


@needs_kernels
def test_positions_that_change_at_a_length() -> None:
    """Up to that length one call decodes Phi-4-mini; a longer text needs transformers."""
    config = config_of("phi3")
    config.hidden_size, config.original_max_position_embeddings = 64, 32
    config.rope_parameters = LONG_ROPE
    torch.manual_seed(0)
    model = class_of(config).from_config(config, dtype=torch.float32).eval()
    assert "32 tokens" in str(why_not(model, 33))
    ids = tiny_windows(1, 32)[0]
    decoder = Decoder(model, 32)
    decoder.prefill(ids[:5])
    steps = torch.stack([decoder.step(int(token)) for token in ids[5:]])
    with torch.no_grad():
        expected = model(input_ids=ids[None], use_cache=False).logits[0, 5:]
    assert float((steps - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@needs_kernels
def test_gate_and_up_of_odd_sizes_in_one_matrix(tmp_path: Path) -> None:
    """After a cut of neurons: rows of 4 bits come in pairs, so those go through transformers."""
    config = config_of("phi3")
    config.hidden_size, config.intermediate_size = 64, 45
    torch.manual_seed(0)
    model = class_of(config).from_config(config, dtype=torch.float32).eval()
    for values in ("int8", "int4"):
        dense, packed = saved(model, tmp_path / f"dense {values}"), tmp_path / values
        secateur.compress(dense, output=packed, values=values)
    assert "rows" in (why_not(secateur.load(tmp_path / "int4")) or "")
    packed_model, ids = secateur.load(tmp_path / "int8", dtype=torch.float32), tiny_windows(1, 9)[0]
    found = SlotDecoder(packed_model, 9).read(0, ids, every=True)
    with torch.no_grad():
        expected = packed_model(input_ids=ids[None], use_cache=False).logits[0]
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("model_type", sorted({config_of(x).model_type for x in ZOO} - {*FORMS}))
def test_other_models_say_why_they_are_decoded_by_transformers(model_type: str) -> None:
    """Before any of their modules is looked at."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    assert model_type in str(why_not(model))
    assert model_type in OUTSIDE  # which the page of families lists
