"""Float32 means float32: TF32 is off where it is promised, and on again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.statistics.gram import Gram
from secateur.errors import NumericalError
from secateur.machine import exact_matmuls, full_float32
from secateur.sparsity.solvers.obs import OBS
from secateur.training.batches import Batches
from secateur.training.loop import Loop, TrainingTask
from secateur.training.objectives import next_token
from secateur.training.training_plan import TrainingPlan


def state() -> tuple[Any, ...]:
    """All that decides in how many bits torch multiplies float32."""
    try:
        word = torch.get_float32_matmul_precision()
    except RuntimeError:
        word = "mixed"
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return word, *(getattr(x, "fp32_precision", None) for x in backends)


@pytest.fixture(params=["by the word", "by the flag", "by the new flag"])
def rough(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
    """A program that allowed TF32 for its own products, in each way there is."""
    matmul: Any = torch.backends.cuda.matmul
    if request.param == "by the word":
        torch.set_float32_matmul_precision("high")
    elif request.param == "by the flag":
        matmul.allow_tf32 = True
    elif hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "tf32"
    yield state()
    torch.set_float32_matmul_precision("highest")


def exact() -> bool:
    return (
        torch.get_float32_matmul_precision() == "highest"
        and not torch.backends.cuda.matmul.allow_tf32
    )


@pytest.mark.parametrize("context", [full_float32, lambda: exact_matmuls(torch.device("cpu"))])
def test_tf32_is_off_inside_and_as_it_was_afterwards(context: Any, rough: tuple[Any, ...]) -> None:
    with context(), context():
        assert exact()
    assert state() == rough
    with pytest.raises(NumericalError), context():
        fail(exact())
    assert state() == rough


def fail(inside: bool) -> None:
    assert inside
    raise NumericalError("the gram is not positive definite")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether TF32 was off, each time that a gram was updated or a solver worked."""
    found: list[bool] = []

    def watched(kind: Any, name: str) -> None:
        plain = getattr(kind, name)

        def watching(*args: Any, **options: Any) -> Any:
            found.append(exact())
            return plain(*args, **options)

        monkeypatch.setattr(kind, name, watching)

    watched(Gram, "update")
    watched(OBS, "solve")
    watched(OBS, "prepare")
    return found


def test_runs_gather_and_solve_without_tf32(rough: tuple[Any, ...], seen: list[bool]) -> None:
    check_run(rough, seen, "uniform")


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("rough", ["by the word"], indirect=True)
def test_a_search_gathers_and_solves_without_tf32(rough: tuple[Any, ...], seen: list[bool]) -> None:
    check_run(rough, seen, "search")


def check_run(rough: tuple[Any, ...], seen: list[bool], allocation: str) -> None:
    """Whatever a run does, TF32 is off in it, and afterwards as it was."""
    model = tiny_model("llama")
    secateur.prune(
        model, calibration=tiny_windows(4), method="sparsegpt", sparsity=0.5, allocation=allocation
    )
    assert len(seen) > 20
    assert all(seen)
    assert state() == rough


def test_training_multiplies_without_tf32(rough: tuple[Any, ...], tmp_path: Path) -> None:
    class Watching:
        exact: list[bool] = []  # noqa: RUF012

        def on_step(self, *_: Any) -> None:
            self.exact.append(exact())

    model, hook = tiny_model("llama"), Watching()
    plan = TrainingPlan(steps=2, fast_matmuls=False)
    windows = Batches(tiny_windows(4), 2, seed=0)
    Loop(TrainingTask(model, windows, next_token(model), hooks=(hook,)), plan).run()
    assert hook.exact == [True, True]
    assert state() == rough
