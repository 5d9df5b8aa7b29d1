"""The manifest of a run: versions, hardware, choices, cost and result, as JSON."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from secateur.errors import DISTRIBUTION


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and hardware of a result."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "secateur": version(DISTRIBUTION),
        **{name: version(name) for name in packages},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cpu_name() -> str:
    """The processor's name, if the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
