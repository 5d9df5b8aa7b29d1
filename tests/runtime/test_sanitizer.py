"""The C code under the address sanitizer and the undefined-behaviour sanitizer.

Everything runs in a process of its own, whose kernels are a build with sanitizers. Tensors lie in
memory that the sanitizer hands out, so a read beyond their padding ends the process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
CSRC = Path(secateur.__file__).parent / "runtime" / "kernels" / "csrc"
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = shutil.which("gcc") or ""


def runtimes() -> list[str]:
    """The sanitizers' own libraries, which have to be loaded before anything else."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        asked = [COMPILER, f"-print-file-name={name}"]
        output = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(output).is_absolute():
            pytest.skip(f"gcc has no {name} here")
        found.append(str(Path(output).resolve()))
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which a process uses kernels that were built with sanitizers."""
    if not COMPILER:
        pytest.skip("there is no gcc here")
    library = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    sources = sorted(map(str, CSRC.glob("*.c")))
    command = [
        COMPILER, "-shared", "-fPIC", "-std=gnu11", "-O1", "-g1", "-fno-omit-frame-pointer",
        "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *FLAGS,
        "-o", str(library), *sources, "-lpthread", "-lm",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {
        **os.environ,
        "SECATEUR_KERNELS": str(library),
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "support", CSRC.parents[3]))),
    }


def sanitized(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """Run a part of `runtime/sanitized_run.py`."""
    script = Path(__file__).with_name("sanitized_run.py")
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    """It came to its end, and no sanitizer said anything."""
    for heading in ("AddressSanitizer", "runtime error"):
        assert heading not in done.stderr, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    assert "came to the end" in done.stdout


@pytest.mark.parametrize("part", ["products", "decoding", "hostile", "bit streams"])
def test_no_sanitizer_has_anything_to_say(part: str, environment, tmp_path: Path) -> None:
    assert_clean(sanitized(environment, part, tmp_path))


def test_a_read_beyond_the_padding_is_seen(environment, tmp_path: Path) -> None:
    """The same products without the room that kernels may read past the values."""
    done = sanitized(environment, "unpadded", tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "came to the end" not in done.stdout
