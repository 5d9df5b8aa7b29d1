"""Ray starts the processes: a real small one where it is installed, and a fake one anywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from trained import source_text

import secateur
from secateur.errors import NumericalError, RankError, RecipeError
from secateur.parallel.ray_launcher import cause_of, launch

OPTIONS: dict[str, Any] = {
    "method": "sparsegpt", "sparsity": 0.5, "windows": 8, "sequence_length": 32,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model and a text."""
    save_tiny(tmp_path / "dense", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(source_text()[:20_000])
    return tmp_path


class FakeRay:
    """What `launch` needs of Ray: it notes the calls, and does the work in this process.

    Args:
        gpus: GPUs of the cluster.
        machines: its machines.
    """

    def __init__(self, gpus: int = 0, machines: int = 3) -> None:
        self.calls: dict[str, Any] = {}
        self.gpus, self.machines = gpus, machines

    def modules(self) -> dict[str, ModuleType]:
        """The modules under which it is imported."""
        ray, train, trainers = ModuleType("ray"), ModuleType("ray.train"), ModuleType("torch")
        ray.__dict__.update(
            train=train,
            init=lambda **how: self.calls.update(init=how),
            is_initialized=lambda: False,
            shutdown=lambda: self.calls.update(shutdown=True),
            nodes=lambda: [{"Alive": True}] * self.machines + [{"Alive": False}],
            cluster_resources=lambda: {"GPU": self.gpus, "CPU": 12},
        )
        train.__dict__.update(
            torch=trainers,
            ScalingConfig=lambda **how: self.calls.update(scaling=how),
            RunConfig=lambda **how: None,
        )
        trainers.__dict__.update(
            TorchConfig=lambda **how: self.calls.update(torch=how), TorchTrainer=self.trainer
        )
        return {"ray": ray, "ray.train": train, "ray.train.torch": trainers}

    def trainer(self, loop: Callable[[Any], None], train_loop_config: Any, **how: Any) -> Any:
        """A trainer that runs its loop once."""
        return SimpleNamespace(fit=lambda: loop(train_loop_config))


def installed(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> None:
    """Import the fake in place of Ray."""
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def test_ray_gets_how_many_processes_and_over_what_they_talk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, done = FakeRay(gpus=16), list[int]()
    installed(monkeypatch, fake)
    launch("auto", None, "auto", partial(done.append, 1))
    assert done == [1]
    assert fake.calls["init"] == {"address": "auto"}
    assert fake.calls["scaling"] == {"num_workers": 16, "use_gpu": True}
    assert "cuda:nccl" in fake.calls["torch"]["backend"]
    assert fake.calls["shutdown"]
    launch("auto", None, "cpu", partial(done.append, 2))
    assert fake.calls["scaling"] == {"num_workers": 3, "use_gpu": False}
    assert fake.calls["torch"]["backend"] == "gloo"
    launch("local", 5, "cpu", partial(done.append, 3))
    assert fake.calls["scaling"]["num_workers"] == 5
    assert fake.calls["init"]["num_cpus"] >= 6


@pytest.mark.parametrize(
    ("gpus", "processes", "device"),
    [(0, None, "cuda"), (0, 2, "cuda"), (2, 3, "cuda"), (2, 3, "auto")],
)
def test_a_cluster_with_too_few_gpus_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int | None, device: str
) -> None:
    installed(monkeypatch, FakeRay(gpus))
    with pytest.raises(RecipeError) as caught:
        launch("auto", processes, device, pytest.fail)
    assert f" {gpus} GPUs" in caught.value.what
    assert "--device cpu" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("gpus", "device", "on_gpu"), [(4, "auto", True), (0, "auto", False), (4, "cpu", False)]
)
def test_the_cluster_says_whether_there_are_gpus_and_not_this_machine(
    place: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, on_gpu: bool
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fake = FakeRay(gpus)
    installed(monkeypatch, fake)
    secateur.prune(
        place / "dense", output=place / "out", method="magnitude", sparsity=0.5, ray="auto",
        device=device,
    )  # fmt: skip
    assert fake.calls["scaling"] == {"num_workers": gpus if on_gpu else 3, "use_gpu": on_gpu}


def test_the_first_real_error_is_reported() -> None:
    lost = RankError("process 0 has lost the others")
    nan = NumericalError("3 weights are NaN", where="layers.1")
    wrapped = SimpleNamespace(_base_exc=nan)
    failed: Any = RuntimeError("training failed")
    failed.worker_failures = {0: lost, 1: wrapped}
    assert cause_of(failed) is nan
    failed.worker_failures = {1: ValueError("first line\nlast line")}
    assert "last line" in cause_of(failed).what
    assert "no memory" in cause_of(RuntimeError("no memory")).what


def test_the_whole_way_through_a_fake(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    installed(monkeypatch, FakeRay())
    shared = {**OPTIONS, "calibration": place / "text.txt", "ray": "local"}
    result = secateur.prune(place / "dense", output=place / "out", processes=2, **shared)
    assert result.sparsity == pytest.approx(0.5)
    assert "ray: local" not in (place / "out" / "secateur" / "recipe.yaml").read_text()
    options = {**shared, "compress": "int8", "processes": 1}
    result = secateur.prune(place / "dense", output=place / "small", **options)
    assert result.compression.output == place / "small"


def test_without_ray_the_message_says_how_to_get_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match="Ray is not installed") as caught:
        secateur.prune(
            place / "dense", output=place / "out", calibration=place / "text.txt", ray="local",
            **OPTIONS,
        )  # fmt: skip
    assert ".[ray]" in (caught.value.remedy or "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray warns of its own options
def test_a_local_ray_makes_the_model_of_one_process(place: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    shared = {**OPTIONS, "calibration": place / "text.txt"}
    secateur.prune(place / "dense", output=place / "one", **shared)
    secateur.prune(place / "dense", output=place / "two", ray="local", processes=2, **shared)
    one, two = (load_file(place / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.equal(weight == 0, two[name] == 0), name
        torch.testing.assert_close(weight, two[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="only 8 calibration windows"):
        secateur.prune(place / "dense", output=place / "many", ray="local", processes=9, **shared)
