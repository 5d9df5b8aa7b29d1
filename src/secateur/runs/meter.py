"""Measured cost of a run: wall time and peak memory, read from the operating system."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since the last reset, or since its start."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def reset_peak() -> bool:
    """Reset the peak where the system can (Linux); returns whether it did."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


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
        return cls(peak_is_of_run=reset_peak())

    def read(self) -> dict[str, float | int | bool]:
        """Seconds, peak resident bytes, and peak CUDA bytes where there is a GPU."""
        reading: dict[str, float | int | bool] = {
            "seconds": time.perf_counter() - self.started,
            "peak_resident_bytes": peak_resident_bytes(),
            "peak_is_of_this_run_alone": self.peak_is_of_run,
        }
        if torch.cuda.is_available():
            reading["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        return reading
