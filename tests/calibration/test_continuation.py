"""Windows that a model writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from slow import few_families
from tiny import save_tiny, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from zoo import CONFIGS, tiny_model, tiny_windows

import secateur
from secateur.calibration import continuation
from secateur.calibration.continuation import (
    PREFIX,
    continue_windows,
    drawn,
    kernels_write,
    opened_for_writing,
    ready_to_write,
    writer_of,
)
from secateur.errors import SourceError

CPU, LENGTH = torch.device("cpu"), 40
needs_kernels = pytest.mark.skipif(
    not kernels_write(tiny_model("llama"), CPU, LENGTH),
    reason="no kernels for many slots here",
)


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


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_every_token_sees_those_before_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token is drawn from is what the whole window gives in one forward without a cache."""
    model = tiny_model(family)
    preferred = model.generation_config  # which changes nothing
    preferred.top_k, preferred.temperature, preferred.repetition_penalty = 1, 0.1, 9.0
    seen: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def draw(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        given.append(drawn(logits))
        return given[-1]

    monkeypatch.setattr(continuation, "drawn", draw)
    own = continue_windows(model, tiny_windows(length=LENGTH), 4, seed=0)
    with torch.no_grad():
        expected = model(own, use_cache=False).logits[:, PREFIX - 1 : -1]
    found = torch.stack(seen, dim=1)
    assert (found[:, :, 2] == -torch.inf).all()
    found[:, :, 2] = expected[:, :, 2]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert 2 not in own[:, PREFIX:]
    assert torch.equal(own[:, PREFIX:], torch.stack(given, dim=1).view(4, -1))


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


def test_too_short_to_begin(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    with pytest.raises(SourceError, match="16 tokens leave nothing"):
        continue_windows(model, windows[:, :PREFIX], 1, seed=0)


@pytest.mark.parametrize("vocabulary", [7, 1024, 257])
def test_drawn_by_share(vocabulary: int) -> None:
    """Half of the tokens have no share, the first and the last among them."""
    torch.manual_seed(0)
    logits = torch.randn(vocabulary)
    logits[::2] = -torch.inf
    logits[-1] = -torch.inf
    found = torch.bincount(drawn(logits.expand(40_000, -1)), minlength=vocabulary).double()
    expected = logits.double().softmax(0) * 40_000
    assert (found[expected == 0] == 0).all()
    some = expected > 0
    chi, degrees = ((found - expected)[some] ** 2 / expected[some]).sum(), int(some.sum()) - 1
    assert chi < degrees + 5 * (2 * degrees) ** 0.5


# -- by the kernels ------------------------------------------------------------------------------

DECODED = [name for name in CONFIGS if kernels_write(tiny_model(name), CPU, LENGTH)]
DECODED += ["qwen2_moe", "gpt_oss"] if DECODED else []


@needs_kernels
@pytest.mark.parametrize("family", DECODED)
def test_kernels_see_every_token_before(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits against one forward of transformers over whole windows, with the same matrices."""
    model, seen = tiny_model(family), []

    def draw(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return drawn(logits)

    monkeypatch.setattr(continuation, "drawn", draw)
    windows = tiny_windows(length=LENGTH)
    with torch.no_grad():
        before = model(windows).logits
    with ready_to_write(model, LENGTH):
        assert writer_of(model) == "kernels, int8"
        own = continue_windows(model, windows, 9, seed=0)
        with torch.no_grad():
            expected = model(own, use_cache=False).logits[:, PREFIX - 1 : -1]
    found = torch.stack(seen, dim=1)
    assert (found[:, :, 2] == -torch.inf).all()
    found[:, :, 2] = expected[:, :, 2]
    # rounded activations, and a token of a mixture may go to another expert
    assert (found - expected).abs().mean() < 0.04 * expected.std()
    assert writer_of(model) == "transformers"
    with torch.no_grad():
        assert torch.equal(model(windows).logits, before)


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_rounded_without_the_whole_model(tied: bool, tmp_path: Path) -> None:
    """It generates what the loaded model generates, but for its embedding in int8."""
    folder = save_tiny(tmp_path / "m", "gemma2" if tied else "mistral")
    model = opened_for_writing(folder, CPU, LENGTH)
    assert writer_of(model) == "kernels, int8"
    windows = tiny_windows(length=LENGTH)
    own = continue_windows(model, windows, 9, seed=0)
    assert torch.equal(own, continue_windows(model, windows, 9, seed=0))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] == tied
    dense = continuation.load_whole(folder, torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        expected, found = dense(own).logits, model(own).logits.float()
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_other_families_are_left_to_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "gpt2")
    model = opened_for_writing(folder, CPU, LENGTH)
    assert writer_of(model) == "transformers"


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_kernels), False])
def test_a_stopped_call_goes_on_exactly(
    kernels: bool, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuation, "AT_ONCE", 3)
    model, known = tiny_model("llama"), []
    with monkeypatch.context() as patch:
        if not kernels:
            patch.setattr(continuation, "why_not", lambda *_: "not now")
        with ready_to_write(model, LENGTH):
            whole = continue_windows(model, windows, 8, seed=1, on_batch=known.append)
            assert [len(x) for x in known] == [3, 6, 8]
            for done in known:
                again = continue_windows(model, windows, 8, seed=1, done=done)
                assert torch.equal(again, whole)


def test_a_killed_run_goes_on_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuation, "AT_ONCE", 2)
    folder = save_tiny(tmp_path / "m", "llama")
    tiny_tokenizer().save_pretrained(folder)
    text = tmp_path / "t.txt"
    text.write_text("stone river lamp ink " * 200, encoding="utf-8")
    options = {"method": "wanda", "sparsity": 0.5, "calibration": text, "windows": 3,
               "sequence_length": 32, "generated_windows": 4}  # fmt: skip
    secateur.prune(folder, output=tmp_path / "whole", **options)
    real, calls = continuation._continued, []

    def stop(*args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(continuation, "_continued", stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(folder, output=tmp_path / "cut", **options)
    secateur.prune(folder, output=tmp_path / "cut", resume=True, **options)
    assert len(calls) == 3
    same = [tmp_path / name / "secateur" / "windows.safetensors" for name in ("whole", "cut")]
    assert same[0].read_bytes() == same[1].read_bytes()
