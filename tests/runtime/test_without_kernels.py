"""Where kernels cannot be had everything still works, expanded."""

from __future__ import annotations

import os
import subprocess
import sys

import secateur
from secateur.errors import KernelError
from tiny import save_tiny

WIDE = {"hidden_size": 72, "head_dim": 16, "intermediate_size": 100}


def run_without_kernels(code: str, library: str = "none") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SECATEUR_KERNELS": library}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_without_kernels_everything_is_expanded(tmp_path):
    save_tiny(tmp_path / "dense", "llama", **WIDE)
    secateur.compress(
        tmp_path / "dense", values="bfloat16", format="bitmask", output=tmp_path / "small"
    )
    done = run_without_kernels(
        "import secateur, torch\n"
        f"model = secateur.load({str(tmp_path / 'small')!r})\n"
        "assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear\n"
        f"made = secateur.generate({str(tmp_path / 'small')!r}, 'abc', max_new_tokens=4)\n"
        "print(secateur.kernel_info().reason, '|', made.loop)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "install a C compiler" in done.stdout
    assert "| transformers" in done.stdout


def test_a_damaged_library_is_an_error(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    done = run_without_kernels("import secateur; secateur.kernel_info()", str(broken))
    assert done.returncode == 1
    assert KernelError.__name__ in done.stderr
    assert "SECATEUR_KERNELS=none" in done.stderr
