"""The foretold time: how timed pieces of work add up."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine import plan_time
from secateur.engine.plan_time import PieceTimes, fraction_of, piece_times, run_seconds
from secateur.engine.prune.tasks import LinearTask, Settings
from secateur.engine.stream.targets import ModelTarget
from secateur.sparsity.methods import compose, methods

CPU = torch.device("cpu")


def task(name: str, shape: tuple[int, int], sparsity: float = 0.5) -> LinearTask:
    return LinearTask(name, shape, compose("wanda", "unstructured"), sparsity)


def test_groups_gather_and_prepare_once_and_every_linear_is_solved() -> None:
    tasks = {t.name: t for t in (task("q", (4, 4)), task("k", (2, 4)), task("left", (4, 4), 0.0))}
    times = {
        "q": PieceTimes(gathering=0.01, preparing=3.0, solving=5.0),
        "k": PieceTimes(gathering=9.0, preparing=9.0, solving=7.0),
    }
    seconds = run_seconds(
        tasks, [("q", "k"), ("left",)], forwards=100.0, tokens=200, times_of=lambda t: times[t.name]
    )
    assert seconds == 100 + 200 * 0.01 + 3 + 5 + 7


@pytest.mark.parametrize("method", sorted(methods))
def test_every_method_can_be_timed(method: str) -> None:
    found = piece_times(compose(method, "unstructured"), (24, 32), 0.5, Settings(), CPU)
    assert found.solving > 0
    assert (found.gathering > 0) == bool(compose(method, "unstructured").requires & INPUTS)


INPUTS = {"column_norm", "gram", "column_mean", "column_variance"}


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("lfm2", 2)])
def test_every_layer_counts_as_one_of_its_kind(
    family: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count()  # one second between any two looks at it
    monkeypatch.setattr(plan_time.time, "perf_counter", lambda: float(next(clock)))
    target = ModelTarget(tiny_model(family))
    found = plan_time.layer_times(target, tiny_windows(4, 8), Settings(micro_batch_tokens=16))
    layers = len(target.layers)
    assert found == plan_time.LayerTimes(forward=layers * 1.0 / 16, reading=layers * 1.0)
    assert next(clock) == 2 * kinds + 2 * 2 * kinds  # reading, and two calls
    assert plan_time.layer_times(target, None, Settings()).forward == 0


def test_large_matrices_are_timed_at_a_fraction_that_divides_them() -> None:
    assert [fraction_of(x) for x in (11008, 14336, 4096)] == [688, 1024, 1024]
    assert fraction_of(2 * 1031) == 2 * 1031


@pytest.mark.parametrize("options", [{"method": "magnitude"}, {"method": "sparsegpt"}])
def test_a_plan_has_a_range_of_seconds(tmp_path: Path, options: dict[str, str]) -> None:
    plan = secateur.prune(str(save_tiny(tmp_path / "m")), dry_run=True, sparsity=0.5, **options)
    assert plan.seconds is not None
    least, most = plan.seconds
    assert 0 < least < most
    assert plan.to_json()["seconds"] == plan.seconds
    assert list(plan.plan.seconds_of_parts) == ["pruning"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_tells_how_long_generating_windows_takes(tmp_path: Path, family: str) -> None:
    """By the kernels and by transformers."""
    file = tmp_path / "w.safetensors"
    save_windows(tiny_windows(4, 40), file)
    folder = save_tiny(tmp_path / "m", family)
    plan = secateur.prune(
        folder, dry_run=True, sparsity=0.5, method="wanda", calibration=file, generated_windows=60
    )
    least, most = plan.plan.seconds_of_parts["generating windows"]
    assert 0 < least < most < plan.seconds[1]
    assert "generating windows" in str(plan)


def test_a_plan_has_the_seconds_of_each_part(tmp_path: Path) -> None:
    options = {"sparsity": 0.5, "calibration": tiny_windows(16), "dry_run": True}
    file = tmp_path / "windows.safetensors"
    save_windows(options.pop("calibration"), file)
    options["calibration"] = str(file)
    folder = str(save_tiny(tmp_path / "m"))
    plain = secateur.prune(folder, method="wanda", **options)
    learns = secateur.prune(
        folder, method="wanda", distill_epochs=1, generated_windows=8, **options
    )
    given = secateur.prune(
        folder, method="wanda", distill_epochs=1, distill_learning_rate=1e-4, **options
    )
    parts = learns.plan.seconds_of_parts
    assert list(plain.plan.seconds_of_parts) == ["pruning"]
    assert list(given.plan.seconds_of_parts) == ["pruning", "distillation"]
    assert list(parts) == [
        "pruning", "generating windows", "trials of the learning rate", "distillation",
    ]  # fmt: skip
    assert learns.seconds == tuple(sum(ends) for ends in zip(*parts.values(), strict=True))
    shown = str(learns)
    assert all(f"  {name}" in shown for name in parts)
    assert "  pruning" not in str(plain)
    trials, training = (parts[name][0] for name in ("trials of the learning rate", "distillation"))
    assert trials / training == pytest.approx(2 * 3 / (24 - 3))
    assert learns.to_json()["seconds_of_parts"] == parts
