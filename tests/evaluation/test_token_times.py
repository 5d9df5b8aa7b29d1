"""Tokens of models without weights are timed in every format, and the times are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from with_kernels import needs_kernels

from secateur.errors import ArchitectureError
from secateur.evaluation import token_times
from secateur.evaluation.token_times import (
    BASE,
    TURNS,
    MatrixTimes,
    how_many,
    machine,
    time_drawing,
    time_matrices,
    time_tokens,
)
from secateur.progress import Silent
from secateur.runtime import random_models
from secateur.runtime.formats import WeightFormat
from secateur.runtime.kernels.library import kernel_info
from secateur.runtime.random_models import STEPS, another, random_matrix

pytestmark = needs_kernels


def config(layers: int = 6, **more: object) -> transformers.LlamaConfig:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, **more}
    return transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, **sizes
    )


def ticking(prompt: float, token: float, outside: float) -> Callable[[], float]:
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
    model = random_models.random_model(config(), WeightFormat(values, sparsity))
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
    clock = ticking(prompt=8.0, token=5.0, outside=1.0)
    times, _ = time_tokens(config(), [stored], Silent(), file=tmp_path / "t.json", clock=clock)
    timed = times[stored]
    # two of six layers were timed
    assert (timed.outside, timed.layers) == (1.0, (5 - 1) * 6 / 2)
    assert timed.prompt == 8.0 * 6 / 2 / 64


def test_layers_that_are_lost_in_the_noise_do_not_take_no_time(tmp_path: Path) -> None:
    """As many tokens as allowed, and then the least that a model may take."""
    clock, stored = ticking(prompt=1.0, token=1.0, outside=1.0), WeightFormat("int8", 0.0)
    for name in ("one", "again"):
        times, _ = time_tokens(config(), [stored], Silent(), file=tmp_path / name, clock=clock)
        assert times[stored].layers == pytest.approx(random_models.LEAST_LAYERS)


def test_a_kept_time_is_not_measured_again(tmp_path: Path) -> None:
    file, stored = tmp_path / "sub" / "t.json", WeightFormat("bf16", 0.0)
    first = time_tokens(config(), [stored], Silent(), file=file)

    def never() -> float:
        raise AssertionError("it was measured already")

    assert time_tokens(config(), [stored], Silent(), file=file, clock=never) == first
    assert first[0][stored].layers > 0
    calls, clock = 0, ticking(prompt=8.0, token=5.0, outside=1.0)

    def counted() -> float:
        nonlocal calls
        calls += 1
        return clock()

    time_tokens(config(layers=5), [stored], Silent(), file=file, clock=counted)
    assert calls == 2 * (TURNS + 1) * (1 + 2 * (1 + STEPS))


def test_a_model_that_our_loop_cannot_decode_is_refused(tmp_path: Path) -> None:
    stored, file = [WeightFormat("bf16", 0.0)], tmp_path / "t.json"
    for model, said in ((transformers.GPT2Config(), "llama"), (config(hidden_act="gelu"), "gelu")):
        with pytest.raises(ArchitectureError, match=said):
            time_tokens(model, stored, Silent(), file=file)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    file, stored = tmp_path / "t.json", WeightFormat("bf16", 0.0)
    file.write_text(content)
    found, day = time_tokens(config(), [stored], Silent(), file=file)
    (entry,) = json.loads(file.read_text())[machine()].values()
    assert entry == {"seconds": [*found[stored]], "measured": day}


# -- of matrices ------------------------------------------------------------------------------


INT4 = WeightFormat("int4", 0.0)
SPARSE, SPARSER = WeightFormat("int8", 0.5), WeightFormat("int8", 0.7)
SHAPES = [(64, 64)] * 4 + [(128, 64)] * 4 + [(64, 128)] * 2


def by_size(shape: tuple[int, int], stored: WeightFormat, count: int) -> float:
    """A millisecond for 4096 weights, and half of it more for what a call costs."""
    return 1e-3 * (shape[0] * shape[1] / 4096 + 0.5)


def looped(config: object, stored: WeightFormat) -> tuple[float, float, float]:
    """Five milliseconds outside the layers; in them, one for each bit of a weight."""
    return 5e-3, 1e-3 * stored.bits, 8e-3


def times_of(
    file: Path, formats: list[WeightFormat], timer: Any = by_size, loop: Any = looped
) -> MatrixTimes:
    """Times of the matrices of a model, by these clocks."""
    model = config(2, num_key_value_heads=4)
    return time_matrices(model, SHAPES, formats, Silent(), file=file, timer=timer, loop=loop)


def test_a_model_of_one_way_takes_what_the_loop_took(tmp_path: Path) -> None:
    formats = [INT4, SPARSE, SPARSER]
    times = times_of(tmp_path / "t.json", formats)
    for stored in (BASE, *formats):
        token = times.rest + sum(times.seconds(shape, stored) for shape in SHAPES)
        assert token == pytest.approx(5e-3 + 1e-3 * stored.bits)
    assert times.base == pytest.approx(13e-3)
    # a matrix of twice the weights takes 2.5 to 1.5 of it
    ratio = times.seconds((128, 64), INT4) / times.seconds((64, 64), INT4)
    assert ratio == pytest.approx(2.5 / 1.5)


def test_a_slow_minute_does_not_count(tmp_path: Path) -> None:
    """A format that was timed while all took three times as long."""

    def busy(config: object, stored: WeightFormat) -> tuple[float, float, float]:
        slower = 1.0 if stored == BASE else 3.0
        return 5e-3 * slower, 1e-3 * stored.bits * slower, 8e-3 * slower

    times = times_of(tmp_path / "t.json", [INT4], loop=busy)
    assert times.layers[INT4] == pytest.approx(4e-3)
    assert times.base == pytest.approx(13e-3)


def test_sparsities_in_between_and_beyond_are_interpolated(tmp_path: Path) -> None:
    times = times_of(tmp_path / "t.json", [INT4, SPARSE, SPARSER])
    for sparsity in (0.3, 0.6, 0.65):
        token = times.rest + sum(times.seconds(s, WeightFormat("int8", sparsity)) for s in SHAPES)
        assert token == pytest.approx(5e-3 + 1e-3 * WeightFormat("int8", sparsity).bits)


def test_a_kept_time_of_a_matrix_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "t.json"
    asked: list[tuple[object, ...]] = []

    def timer(shape: tuple[int, int], stored: WeightFormat, count: int) -> float:
        asked.append((shape, stored))
        return by_size(shape, stored, count)

    def loop(config: object, stored: WeightFormat) -> tuple[float, float, float]:
        asked.append((stored,))
        return looped(config, stored)

    run = partial(times_of, file, timer=timer, loop=loop)
    run([INT4])
    assert len(asked) == len(set(asked)) == 8  # three shapes and a loop, for int4 and the base
    run([INT4])
    assert len(asked) == 8
    run([INT4, SPARSE])
    assert asked[8:] == [(SPARSE,), *((shape, SPARSE) for shape in dict.fromkeys(SHAPES))]
    kept = json.loads(file.read_text())
    (here,) = kept
    assert here == machine()
    assert kernel_info().tier in here
    assert f"{kernel_info().threads} threads" in here
    assert all(len(entry["measured"]) == len("2026-01-01") for entry in kept[here].values())


def test_an_entry_that_is_no_time_is_measured_again(tmp_path: Path) -> None:
    """Zeros were stored where layers took less than the clock could tell, and then divided by."""
    file = tmp_path / "t.json"

    sound = times_of(file, [INT4])
    table = json.loads(file.read_text())
    for broken in ([3e-4, 0.0, 0.0], 0.0, [], None, float("inf"), float("nan"), "fast"):
        for entry in table[machine()].values():
            entry["seconds"] = broken
        file.write_text(json.dumps(table))
        assert times_of(file, [INT4]) == sound


def test_times_of_another_machine_are_kept_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.json"
    for name, second in (("one", 1.0), ("another", 2.0)):
        monkeypatch.setattr(token_times, "machine", lambda name=name: name)
        times = times_of(file, [], loop=lambda c, w, second=second: (second,) * 3)
        assert times.base == 2 * second
    assert set(json.loads(file.read_text())) == {"one", "another"}


@pytest.mark.parametrize("stored", [BASE, SPARSE, INT4, WeightFormat("bf16", 0.7)])
def test_as_many_matrices_are_timed_as_a_model_has_bytes(stored: WeightFormat) -> None:
    counts = {(64, 64): 4, (128, 64): 4, (64, 128): 2}
    sizes = {s: random_matrix(*s, stored.values, stored.sparsity).nbytes for s in counts}
    for shape in counts:
        made = how_many(counts, shape, stored) * sizes[shape]
        whole = sum(n * sizes[s] for s, n in counts.items())
        assert made == pytest.approx(whole, rel=0.35)  # small ones have scales and offsets too


def test_real_kernels_and_loops_are_timed(tmp_path: Path) -> None:
    times = times_of(tmp_path / "t.json", [INT4], None, None)
    assert all(seconds > 0 for seconds in times.layers.values())
    assert all(0 < share < 1 for share in times.shares.values())
    assert 0 < times.rest < times.base


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawing_is_timed_once(tmp_path: Path, temperature: float) -> None:
    file = tmp_path / "times.json"
    for rows in (None, 40):
        found = time_drawing(temperature, 96, rows, file=file)
        assert min(found.proposed, found.judged) > 0
        assert time_drawing(temperature, 96, rows, file=file) == found
    assert len(json.loads(file.read_text())[machine()]) == 2
