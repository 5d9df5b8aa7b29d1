"""Tokens of models without weights are timed in every format, and the times are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers

from secateur.errors import ArchitectureError
from secateur.evaluation import random_models
from secateur.evaluation.random_models import (
    LEAST_LAYERS,
    STEPS,
    WeightFormat,
    another,
    random_matrix,
    random_model,
)
from secateur.evaluation.token_times import TURNS, machine, time_tokens
from secateur.progress import Silent
from secateur.runtime.kernels.library import kernel_info

pytestmark = pytest.mark.skipif(kernel_info().tier == "none", reason="there are no kernels here")


def config(layers: int = 6, **more: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, **more,
    )  # fmt: skip


def scripted(prompt: float, token: float, outside: float) -> Callable[[], float]:
    """A clock by which prompts, tokens, and tokens without layers take so long."""

    def ticks() -> Iterator[float]:
        now = 0.0
        for lasts in cycle([prompt] + [token] * (1 + STEPS) + [outside] * (1 + STEPS)):
            yield now
            now += lasts
            yield now

    return ticks().__next__


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_random_model_has_the_sizes_and_the_zeros(values: str, sparsity: float) -> None:
    model = random_model(config(), WeightFormat(values, sparsity))
    assert len(model.model.layers) == 6
    down = model.model.layers[3].mlp.down_proj.matrix
    assert (down.rows, down.columns) == (64, 128)
    assert down.nonzeros == round(64 * 128 * (1 - sparsity))
    assert (down.mask is None) == (sparsity == 0)
    # every layer has memory of its own
    places = {layer.mlp.down_proj.matrix.values.data_ptr() for layer in model.model.layers}
    assert len(places) == 6
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_another_matrix_multiplies_alike() -> None:
    for values in ("bf16", "int8", "int4"):
        one = random_matrix(32, 64, values, 0.5)
        x = torch.randn(2, 64)
        assert torch.equal(another(one).multiply(x), one.multiply(x))


def test_times_of_all_layers_follow_from_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_models, "LAYER_BYTES", 1)
    stored = WeightFormat("int8", 0.5)
    clock = scripted(prompt=8.0, token=5.0, outside=1.0)
    times, _ = time_tokens(config(), [stored], Silent(), file=tmp_path / "t.json", clock=clock)
    timed = times[stored]
    # two of six layers were timed
    assert (timed.outside, timed.layers) == (1.0, (5 - 1) * 6 / 2)
    assert timed.prompt == 8.0 * 6 / 2 / 64


def test_layers_that_are_lost_in_the_noise_do_not_take_no_time(tmp_path: Path) -> None:
    """As many tokens as allowed, and then the least that a model may take."""
    clock, stored = scripted(prompt=1.0, token=1.0, outside=1.0), WeightFormat("int8", 0.0)
    for name in ("one", "again"):
        times, _ = time_tokens(config(), [stored], Silent(), file=tmp_path / name, clock=clock)
        assert times[stored].layers == pytest.approx(LEAST_LAYERS)


def test_a_kept_time_is_not_measured_again(tmp_path: Path) -> None:
    file, stored = tmp_path / "sub" / "t.json", WeightFormat("bf16", 0.0)
    first = time_tokens(config(), [stored], Silent(), file=file)

    def never() -> float:
        raise AssertionError("it was measured already")

    assert time_tokens(config(), [stored], Silent(), file=file, clock=never) == first
    assert first[0][stored].layers > 0
    calls, clock = 0, scripted(prompt=8.0, token=5.0, outside=1.0)

    def counted() -> float:
        nonlocal calls
        calls += 1
        return clock()

    time_tokens(config(layers=5), [stored], Silent(), file=file, clock=counted)
    assert calls == 2 * (TURNS + 1) * (1 + 2 * (1 + STEPS))


def test_a_model_that_our_loop_cannot_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="llama"):
        time_tokens(
            transformers.GPT2Config(),
            [WeightFormat("bf16", 0.0)],
            Silent(),
            file=tmp_path / "t.json",
        )
    with pytest.raises(ArchitectureError, match="gelu"):
        time_tokens(
            config(hidden_act="gelu"),
            [WeightFormat("bf16", 0.0)],
            Silent(),
            file=tmp_path / "t.json",
        )


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    file, stored = tmp_path / "t.json", WeightFormat("bf16", 0.0)
    file.write_text(content)
    found, day = time_tokens(config(), [stored], Silent(), file=file)
    (entry,) = json.loads(file.read_text())[machine()].values()
    assert entry == {"seconds": [*found[stored]], "measured": day}
