"""Versions and hardware of a run, and its measured cost: wall time and peak memory."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from secateur.errors import DISTRIBUTION, RecipeError


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and hardware of a result."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "secateur": version(DISTRIBUTION),
        **{name: version(name) for name in packages},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    """The processor's name, if the system reports it."""
    try:
        with CPUINFO.open(encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def usable_processors() -> int:
    """The processors that this process may use; all, where the system does not say which."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


CPUINFO = Path("/proc/cpuinfo")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def _peak_resident_bytes() -> int:
    """Highest resident memory of this process since the last reset, or since its start."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    of_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if of_windows is not None:
        return int(of_windows)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


@dataclass
class Meter:
    """Measures a run from `start` to `read`."""

    started: float = field(default_factory=time.perf_counter)
    peak_is_of_run: bool = False

    @classmethod
    def start(cls) -> Meter:
        """Start measuring now."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:  # Linux forgets the peak of all that came before
            CLEAR_REFS.write_text("5", encoding="utf-8", newline="\n")
        except OSError:
            return cls()
        return cls(peak_is_of_run=True)

    def read(self) -> dict[str, float | int | bool]:
        """Seconds, peak resident bytes, and peak CUDA bytes where there is a GPU."""
        reading: dict[str, float | int | bool] = {
            "seconds": time.perf_counter() - self.started,
            "peak_resident_bytes": _peak_resident_bytes(),
            "peak_is_of_this_run_alone": self.peak_is_of_run,
        }
        if torch.cuda.is_available():
            reading["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        return reading


def choose_device(name: str, only_cpu: str | None = None) -> torch.device:
    """Return the device of a recipe.

    Args:
        name: of the device.
        only_cpu: an option that was given and that only the CPU obeys. `auto` takes the CPU then.

    Raises:
        RecipeError: this machine has no such device, or the option does not fit it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not only_cpu else "cpu")
    if only_cpu and name != "cpu":
        raise RecipeError(
            f"{only_cpu} works on the CPU alone, and the device is {name}",
            where=only_cpu,
            remedy="leave it out, or use --device cpu",
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(
            f"device {name!r} is not auto, cpu, cuda or cuda:N",
            remedy="leave --device out: auto takes the GPU if torch sees one",
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            f"device {name!r} was asked for, and torch sees no CUDA device here",
            remedy="use --device cpu, or install a CUDA build of torch",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {name!r} was asked for, and torch sees {torch.cuda.device_count()} GPUs here",
            remedy="count them from cuda:0 on",
        )
    return device


def current(name: str) -> torch.cuda.device:
    """A context in which a GPU is the one that "cuda" without a number means.

    Raises:
        RecipeError: this machine has no such device.
    """
    return torch.cuda.device(choose_device(name))
