"""The pretended device. `parts/` is collected only by the process that `rehearse.py` starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
collect_ignore = [] if "PRETENDED_CUDA" in os.environ else ["parts"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device that does nothing, compiled against the torch that is installed."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++): the rehearsal on a pretended GPU needs one")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs: the pretended one would get in its way")
    torch_folder = Path(torch.__file__).parent
    built = tmp_path_factory.mktemp("device") / "no_device.so"
    command = [
        compiler, "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch_folder / 'include'}",
        str(HERE / "no_device.cpp"), "-o", str(built), f"-L{torch_folder / 'lib'}", "-lc10",
        "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the device does not compile:\n{done.stderr[-4000:]}"
    return built
