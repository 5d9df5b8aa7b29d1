"""The kernels for AMX on a processor without it: its tiles are pretended in plain C.

What is tested is that numbers are right. The products of `test_prompt.py` run in a process of their
own, with a library whose check of the processor says yes to `amx`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from runtime.kernel_examples import TIERS
from secateur.runtime.kernels.library import kernel_info

CSRC = Path(secateur.__file__).parent / "runtime" / "kernels" / "csrc"
COMPILER = shutil.which("gcc") or ""
CHECK = "static int can(const char *tier) {"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not COMPILER or kernel_info().tier not in TIERS[:2],
        reason="needs gcc and a processor with AVX-512 BF16",
    ),
]


def test_products_by_tiles(tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cpu.c"
    text = source.read_text(encoding="utf-8")
    assert CHECK in text
    yes = f'{CHECK}\n    if (!strcmp(tier, "amx")) return 1;'
    source.write_text(text.replace(CHECK, yes, 1), encoding="utf-8")
    pretended = ["-include", str(Path(__file__).with_name("pretended_tiles.h"))]
    for name in sorted((tmp_path / "csrc").glob("*.c")):
        before = pretended if name.stem.endswith("_amx") else []
        command = [COMPILER, "-c", "-fPIC", "-std=gnu11", "-O2", "-fno-math-errno", *before]
        subprocess.run([*command, name, "-o", name.with_suffix(".o")], check=True)
    objects = sorted((tmp_path / "csrc").glob("*.o"))
    library = tmp_path / "kernels.so"
    subprocess.run([COMPILER, "-shared", "-o", library, *objects, "-lpthread", "-lm"], check=True)
    tests = Path(__file__).with_name("test_prompt.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "amx", str(tests)],
        env={**os.environ, "SECATEUR_KERNELS": str(library)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
