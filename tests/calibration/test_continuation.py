"""Windows that a model writes itself."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from secateur.calibration import continuation
from secateur.calibration.continuation import PREFIX, continue_windows, drawn
from secateur.errors import SourceError
from slow import few_families
from zoo import CONFIGS, tiny_model, tiny_windows

LENGTH = 40


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(3, 50, (5, LENGTH), generator=torch.Generator().manual_seed(1))


def test_each_begins_in_its_window(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    own = continue_windows(model, windows, 7, seed=0)
    assert own.shape == (7, LENGTH)
    assert own.dtype == torch.int64
    for row, ids in enumerate(own.tolist()):
        source = windows[row % 5].tolist()
        assert ids[:PREFIX] in [source[i : i + PREFIX] for i in range(LENGTH - PREFIX)]


def test_drawn_as_the_model_believes(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    """Frequencies of the first drawn token against softmax(logits), whatever the model prefers."""
    model.generation_config.top_k = 1
    model.generation_config.temperature = 0.1
    model.generation_config.repetition_penalty = 9.0
    one = windows[:1, : PREFIX + 1]  # there is one place to begin
    own = continue_windows(model, one, 2000, seed=3)
    with torch.no_grad():
        logits = model(one[:, :PREFIX]).logits[0, -1].double()
    logits[2] = -torch.inf  # a window does not end early
    expected = logits.softmax(0)
    found = torch.bincount(own[:, PREFIX], minlength=50) / len(own)
    deviation = (expected * (1 - expected) / len(own)).sqrt()
    assert ((found - expected).abs() <= 4.5 * deviation).all()


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_every_token_sees_those_before_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token is drawn from is what the whole window gives in one forward without a cache."""
    model = tiny_model(family)
    seen: list[torch.Tensor] = []

    def draw(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return drawn(logits)

    monkeypatch.setattr(continuation, "drawn", draw)
    own = continue_windows(model, tiny_windows(length=LENGTH), 4, seed=0)
    with torch.no_grad():
        expected = model(own, use_cache=False).logits[:, PREFIX - 1 : -1]
    found = torch.stack(seen, dim=1)
    assert (found[:, :, 2] == -torch.inf).all()
    found[:, :, 2] = expected[:, :, 2]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert 2 not in own[:, PREFIX:]


def test_a_model_without_a_cache(windows: torch.Tensor) -> None:
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> CausalLMOutput:
            return CausalLMOutput(logits=torch.zeros(*input_ids.shape, 50))

    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    with pytest.raises(SourceError, match="Forgetful cannot continue"):
        continue_windows(Forgetful(config), windows, 1, seed=0)


def test_the_seed_decides(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    state = torch.random.get_rng_state()
    one, again, other = (continue_windows(model, windows, 3, seed=s) for s in (4, 4, 5))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_tells_of_every_token(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    calls: list[None] = []
    continue_windows(model, windows, 3, seed=0, on_token=lambda: calls.append(None))
    assert len(calls) == LENGTH - PREFIX


def test_none_is_none(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    assert continue_windows(model, windows, 0, seed=0).shape == (0, LENGTH)


def test_too_short_to_begin(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    with pytest.raises(SourceError, match="16 tokens leave nothing"):
        continue_windows(model, windows[:, :PREFIX], 1, seed=0)
