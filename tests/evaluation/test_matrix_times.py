"""The time of a token is added up from a table of measured times, and the table is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from secateur.evaluation import token_times
from secateur.evaluation.random_models import WeightFormat, random_matrix
from secateur.evaluation.token_times import BASE, how_many, machine, time_matrices
from secateur.progress import Silent
from secateur.runtime.kernels.library import kernel_info

pytestmark = pytest.mark.skipif(kernel_info().tier == "none", reason="there are no kernels here")

INT4 = WeightFormat("int4", 0.0)
SPARSE, SPARSER = WeightFormat("int8", 0.5), WeightFormat("int8", 0.7)
SHAPES = [(64, 64)] * 4 + [(128, 64)] * 4 + [(64, 128)] * 2


def config(**more: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, **more,
    )  # fmt: skip


def scripted(shape: tuple[int, int], stored: WeightFormat, count: int) -> float:
    """A millisecond for 4096 weights, and half of it more for what a call costs."""
    return 1e-3 * (shape[0] * shape[1] / 4096 + 0.5)


def looped(config: object, stored: WeightFormat) -> tuple[float, float, float]:
    """Five milliseconds outside the layers; in them, one for each bit of a weight."""
    return 5e-3, 1e-3 * stored.bits, 8e-3


def test_a_model_of_one_way_takes_what_the_loop_took(tmp_path: Path) -> None:
    formats = [INT4, SPARSE, SPARSER]
    times = time_matrices(
        config(), SHAPES, formats, Silent(), file=tmp_path / "t.json", timer=scripted, loop=looped
    )
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

    times = time_matrices(
        config(), SHAPES, [INT4], Silent(), file=tmp_path / "t.json", timer=scripted, loop=busy
    )
    assert times.layers[INT4] == pytest.approx(4e-3)
    assert times.base == pytest.approx(13e-3)


def test_sparsities_in_between_and_beyond_are_interpolated(tmp_path: Path) -> None:
    times = time_matrices(
        config(), SHAPES, [INT4, SPARSE, SPARSER], Silent(), file=tmp_path / "t.json",
        timer=scripted, loop=looped,
    )  # fmt: skip
    for sparsity in (0.3, 0.6, 0.65):
        token = times.rest + sum(times.seconds(s, WeightFormat("int8", sparsity)) for s in SHAPES)
        assert token == pytest.approx(5e-3 + 1e-3 * WeightFormat("int8", sparsity).bits)


def test_a_kept_time_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "t.json"
    asked: list[tuple[object, ...]] = []

    def timer(shape: tuple[int, int], stored: WeightFormat, count: int) -> float:
        asked.append((shape, stored))
        return scripted(shape, stored, count)

    def loop(config: object, stored: WeightFormat) -> tuple[float, float, float]:
        asked.append((stored,))
        return looped(config, stored)

    def run(formats: list[WeightFormat]) -> None:
        time_matrices(config(), SHAPES, formats, Silent(), file=file, timer=timer, loop=loop)

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

    def run() -> token_times.MatrixTimes:
        return time_matrices(
            config(), SHAPES, [INT4], Silent(), file=file, timer=scripted, loop=looped
        )

    sound = run()
    table = json.loads(file.read_text())
    for broken in ([3e-4, 0.0, 0.0], 0.0, [], None, float("inf"), float("nan"), "fast"):
        for entry in table[machine()].values():
            entry["seconds"] = broken
        file.write_text(json.dumps(table))
        assert run() == sound


def test_times_of_another_machine_are_kept_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.json"
    for name, second in (("one", 1.0), ("another", 2.0)):
        monkeypatch.setattr(token_times, "machine", lambda name=name: name)
        times = time_matrices(
            config(), SHAPES, [], Silent(), file=file, timer=scripted,
            loop=lambda c, w, second=second: (second, second, second),
        )  # fmt: skip
        assert times.base == 2 * second
    assert set(json.loads(file.read_text())) == {"one", "another"}


@pytest.mark.parametrize("stored", [BASE, SPARSE, INT4, WeightFormat("bf16", 0.7)])
def test_as_many_matrices_are_timed_as_a_model_has_bytes(stored: WeightFormat) -> None:
    counts = {(64, 64): 4, (128, 64): 4, (64, 128): 2}
    for shape in counts:
        made = (
            how_many(counts, shape, stored)
            * random_matrix(*shape, stored.values, stored.sparsity).nbytes
        )
        whole = sum(
            n * random_matrix(*s, stored.values, stored.sparsity).nbytes for s, n in counts.items()
        )
        assert made == pytest.approx(whole, rel=0.35)  # small ones have scales and offsets too


def test_real_kernels_and_loops_are_timed(tmp_path: Path) -> None:
    times = time_matrices(config(), SHAPES, [INT4], Silent(), file=tmp_path / "t.json")
    assert all(seconds > 0 for seconds in times.layers.values())
    assert all(0 < share < 1 for share in times.shares.values())
    assert 0 < times.rest < times.base
