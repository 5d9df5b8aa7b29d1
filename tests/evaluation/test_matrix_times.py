"""The time of a token is added up from a table of timed matrices, and the table is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from secateur.errors import ArchitectureError
from secateur.evaluation import matrix_times
from secateur.evaluation.matrix_times import BASE, how_many, machine, time_matrices
from secateur.evaluation.random_matrices import random_matrix
from secateur.evaluation.token_times import Way
from secateur.progress import Silent
from secateur.runtime.kernels.library import kernel_info

pytestmark = pytest.mark.skipif(kernel_info().tier == "none", reason="there are no kernels here")

INT4 = Way("int4", 0.0)
SPARSE = Way("int8", 0.5)
SHAPES = [(64, 64)] * 4 + [(128, 64)] * 4 + [(64, 128)] * 2


def config(**more: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, **more,
    )  # fmt: skip


def scripted(shape: tuple[int, int], way: Way, count: int) -> float:
    """A millisecond for 4096 weights of int8, and by the bits for other ways."""
    return 1e-3 * shape[0] * shape[1] / 4096 * way.bits / 8


def test_a_token_of_the_base_is_what_the_loop_took(tmp_path: Path) -> None:
    times = time_matrices(
        config(), SHAPES, [INT4, SPARSE], Silent(), file=tmp_path / "t.json",
        timer=scripted, loop=lambda config, way: 0.05,
    )  # fmt: skip
    assert times.base == 0.05
    linears = sum(times.seconds(shape, BASE) for shape in SHAPES)
    assert linears == pytest.approx(1e-3 * (4 + 8 + 4))
    assert times.rest + linears == pytest.approx(0.05)
    halved = times.rest + sum(times.seconds(shape, INT4) for shape in SHAPES)
    assert halved == pytest.approx(0.05 - 8e-3)
    sparse = times.seconds((128, 64), SPARSE)
    assert sparse == pytest.approx(2e-3 * 5 / 8)  # a bit for each weight, and half of the bytes


def test_a_kept_time_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "t.json"
    asked: list[tuple[object, ...]] = []

    def counted(shape: tuple[int, int], way: Way, count: int) -> float:
        asked.append((shape, way))
        return 1.0

    def run(ways: list[Way]) -> None:
        time_matrices(
            config(), SHAPES, ways, Silent(), file=file, timer=counted, loop=lambda c, w: 100.0
        )

    run([INT4])
    assert len(asked) == len(set(asked)) == 6  # three shapes, int4 and the base
    run([INT4])
    assert len(asked) == 6
    run([INT4, SPARSE])
    assert asked[6:] == [(shape, SPARSE) for shape in dict.fromkeys(SHAPES)]
    told = json.loads(file.read_text())
    (here,) = told
    assert here == machine()
    assert kernel_info().tier in here
    assert f"{kernel_info().threads} threads" in here
    assert all(len(entry["measured"]) == len("2026-01-01") for entry in told[here].values())


def test_times_of_another_machine_are_kept_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.json"
    for name, second in (("one", 1.0), ("another", 2.0)):
        monkeypatch.setattr(matrix_times, "machine", lambda name=name: name)
        times = time_matrices(
            config(), SHAPES, [], Silent(), file=file,
            timer=lambda s, w, n, second=second: second, loop=lambda c, w: 100.0,
        )  # fmt: skip
        assert times.seconds((64, 64), BASE) == second
    assert set(json.loads(file.read_text())) == {"one", "another"}


@pytest.mark.parametrize("way", [BASE, SPARSE, INT4, Way("bf16", 0.7)])
def test_as_many_matrices_are_timed_as_a_model_has_bytes(way: Way) -> None:
    counts = {(64, 64): 4, (128, 64): 4, (64, 128): 2}
    for shape in counts:
        made = how_many(counts, shape, way) * random_matrix(*shape, way.values, way.sparsity).nbytes
        whole = sum(
            n * random_matrix(*s, way.values, way.sparsity).nbytes for s, n in counts.items()
        )
        assert made == pytest.approx(whole, rel=0.35)  # small ones have scales and offsets too


def test_real_kernels_are_timed(tmp_path: Path) -> None:
    times = time_matrices(config(), SHAPES, [INT4], Silent(), file=tmp_path / "t.json")
    assert all(one.seconds > 0 for one in times.matrices.values())
    assert times.base > 0


def test_a_model_that_our_loop_cannot_decode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="its type is not one of llama"):
        time_matrices(
            transformers.GPT2Config(), SHAPES, [], Silent(), file=tmp_path / "t.json",
            timer=scripted,
        )  # fmt: skip
    assert torch.is_inference_mode_enabled() is False
