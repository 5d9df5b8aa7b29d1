"""Which way a matrix takes on a GPU: by a pretended clock, and on the device of its tensors.

Kernels are pretended: they compute nothing, or fail as Triton's compiler and a GPU do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install '.[gpu]'")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from secateur.runtime.kernels.gpu import bitmask, integers, linear
from secateur.runtime.kernels.gpu.bitmask import GpuBitmask
from secateur.runtime.kernels.gpu.integers import GpuIntegers
from secateur.runtime.kernels.linear import IntegerLinear

Fault = Callable[[], Exception]
ILLEGAL = "CUDA error: an illegal memory access was encountered"
REFUSALS: list[Fault] = [
    lambda: CompilationError("x = 1", None, "a kernel that Triton does not know"),
    lambda: OutOfResources(2**18, 2**17, "shared memory"),
    lambda: PTXASError("Internal Triton PTX codegen error"),
    lambda: RuntimeError("Only CC 8.x devices are supported"),
    lambda: AssertionError("libcuda.so cannot found!"),
    lambda: CalledProcessError(1, "gcc"),
]
CPU = torch.device("cpu")


@dataclass
class Pretended:
    """A matrix whose products take the seconds that the clock says, or raise."""

    integers: bool
    seconds: Callable[[str, int], float]
    fault: Callable[[str, int], Exception | None] = lambda way, tokens: None
    shape: tuple[int, int] = (3, 4)

    def multiply(self, x: Tensor) -> float:
        return self.taken("kernel", x)

    def expanded(self, x: Tensor) -> float:
        return self.taken("expanded", x)

    def taken(self, way: str, x: Tensor) -> float:
        if (fault := self.fault(way, len(x))) is not None:
            raise fault
        return self.seconds(way, len(x))

    def clock(self, calls: Any) -> list[float]:
        """A dense product gives a tensor, and takes 1 second."""
        found = [call() for call in calls]
        return [1.0 if isinstance(x, Tensor) else x for x in found]

    def choice(self) -> tuple[int, float]:
        found = linear.measured(self, torch.float32, CPU, self.clock)  # type: ignore[arg-type]
        return found.kernel_up_to, found.speedup_over_dense


def expanding_wins_from(tokens: int, kernel: float = 0.5) -> Callable[[str, int], float]:
    return lambda way, n: kernel if way == "kernel" else kernel + 0.1 * (tokens - n)


@pytest.mark.parametrize(
    ("is_integers", "first", "up_to"),
    [
        (False, 1, 1),
        (False, 5, 4),
        (False, 100, 16),
        (True, 0, 0),
        (True, 64, 64),
        (True, 9999, 1024),
    ],
)
def test_the_kernel_is_taken_up_to_where_expanding_wins(
    is_integers: bool, first: int, up_to: int
) -> None:
    found, speedup = Pretended(is_integers, expanding_wins_from(first)).choice()
    assert found == up_to
    assert speedup == (float("inf") if is_integers else 2.0)


@pytest.mark.parametrize(("kernel", "speedup"), [(0.25, 4.0), (2.0, 0.5)])
def test_floats_are_compared_with_the_dense_matrix(kernel: float, speedup: float) -> None:
    assert Pretended(False, expanding_wins_from(99, kernel)).choice() == (16, speedup)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_kernel_that_does_not_run_is_left_out(
    refusal: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "said", set())
    seconds = expanding_wins_from(9999)
    for is_integers, tokens, up_to in ((True, 1, 0), (True, 64, 16), (False, 1, 0), (False, 8, 4)):

        def fault(way: str, n: int, least: int = tokens) -> Exception | None:
            return refusal() if way == "kernel" and n >= least else None

        found, speedup = Pretended(is_integers, seconds, fault).choice()
        assert (found, speedup) == (up_to, float("inf") if is_integers else 0.0)
    assert [type(refusal()).__name__ in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when it is waited for"])
def test_an_illegal_access_is_no_refusal(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on the GPU after it, so no other way is faster."""
    broken: list[int] = []

    def fault(way: str, tokens: int) -> Exception | None:
        broken.append(tokens)
        return None if late else RuntimeError(ILLEGAL)

    def synchronize() -> None:
        if broken:
            raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal"):
        Pretended(True, expanding_wins_from(9), fault).choice()
    assert broken == [1]


def test_full_memory_is_no_refusal() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        linear.runs(Pretended(True, lambda w, n: 1, lambda w, n: torch.OutOfMemoryError()).choice)


def integer_matrix(group: int | None) -> GpuIntegers:
    scales = torch.ones(8) if group is None else torch.ones(8, 128 // group)
    return GpuIntegers.of(IntegerLinear(torch.ones(8, 128, dtype=torch.int8), scales, group), "cpu")


def launches() -> dict[str, Callable[[], object]]:
    """Every function that launches a kernel."""
    weight, x = torch.ones(8, 128), torch.ones(1, 128)
    floats = GpuBitmask.of(weight > 0, weight.flatten(), "cpu")
    return {
        "bitmask_product": lambda: floats.multiply(x),
        "bitmask_expand": lambda: floats.dense(torch.float32),
        "integer_product": lambda: integer_matrix(64).multiply(x),
        "rounded": lambda: integer_matrix(None).multiply(x),
    }


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that are made the current one, while they are."""
    devices = list[torch.device]()

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return devices


@pytest.mark.parametrize("name", launches())
def test_a_kernel_is_launched_on_the_device_of_its_tensors(
    name: str, current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which may be another one."""
    seen: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: seen.append([*current])

    for module in (bitmask, integers):
        for kernel in set(launches()) & set(vars(module)):
            monkeypatch.setattr(module, kernel, Kernel())
    launches()[name]()
    assert seen
    assert all(devices == [CPU] for devices in seen)


def test_the_race_is_on_the_device_of_the_matrix(current: list[torch.device]) -> None:
    seen = list[list[torch.device]]()
    Pretended(True, lambda way, n: float(seen.append([*current]) or 1)).choice()
    assert seen
    assert all(devices == [CPU] for devices in seen)
