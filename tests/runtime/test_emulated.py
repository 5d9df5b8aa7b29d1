"""The kernels for other machines, built by a cross compiler and run by an emulator.

ARM with Linux by qemu, x86 with Windows by wine. What is tested is that numbers are right. An
emulator says nothing about speed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import secateur
from oracles.kernels import bitmask_product, rounded_to_bytes
from runtime.attention_examples import CACHES, a_text, oracle_of, rounding
from runtime.kernel_examples import example, example_of_codes
from secateur.quantization.groups import GROUPS
from secateur.runtime.kernels.library import TYPES
from secateur.runtime.kernels.matrix import KernelMatrix

pytestmark = pytest.mark.slow

CSRC = Path(secateur.__file__).parent / "runtime" / "kernels" / "csrc"
LINEAR, PROMPT, EXPAND, ATTEND, SILU = range(5)
SHAPES = ((1, 1), (5, 64), (7, 577), (40, 1000))
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
Run = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Machine:
    """A machine that is emulated: how to compile for it and how to run what was compiled."""

    compiler: tuple[str, ...]
    emulator: tuple[str, ...]
    tiers: tuple[str, ...]
    missing: str = ""

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a program."""
        environment = {**os.environ, "WINEDEBUG": "-all"}
        command = [*self.emulator, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def machines() -> dict[str, Machine]:
    """Those that are known, and what is missing to emulate them here."""
    gcc, qemu = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    zig, wine = importlib.util.find_spec("ziglang"), shutil.which("wine")
    packages = "(Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)"
    windows = (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu")
    return {
        "linux-arm": Machine(
            (str(gcc), "-static", "-pthread"),
            (str(qemu), "-cpu", "max"),
            ("neon-i8mm", "neon"),
            "" if gcc and qemu else f"needs aarch64-linux-gnu-gcc and qemu-aarch64 {packages}",
        ),
        "windows-x86": Machine(
            (*windows, "-Wextra"),
            (str(wine),),
            ("amx", "avx512bf16", "avx512", "avx2"),
            "" if zig and wine else "needs zig and wine (pip: ziglang; Debian: wine64, wine)",
        ),
    }


MACHINES = machines()
NO_SUCH_TIER = 3
"""How the program ends where the processor does not have it."""


@pytest.fixture(scope="module", autouse=True)
def _own_wine(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("WINEPREFIX", str(tmp_path_factory.mktemp("wine")))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """All sources of the library and `kernel_program.c`, for a machine."""
    folder = tmp_path_factory.mktemp("emulated")

    def of(name: str) -> Path:
        machine, made = MACHINES[name], folder / f"{name}.exe"
        if machine.missing:
            pytest.skip(machine.missing)
        if not made.exists():
            sources = [*sorted(CSRC.glob("*.c")), Path(__file__).with_name("kernel_program.c")]
            command = [
                *machine.compiler, "-std=gnu11", "-O3",
                "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror",
                "-Wno-unknown-pragmas", f"-I{CSRC}", "-o", str(made), *map(str, sources),
                "-lm",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return made

    return of


@pytest.fixture(
    params=[(name, tier) for name in MACHINES for tier in MACHINES[name].tiers], ids="-".join
)
def run(request: pytest.FixtureRequest, programs: Callable[[str], Path], tmp_path: Path) -> Run:
    """Runs commands on a machine with a tier; returns the output."""
    name, tier = request.param
    program = programs(name)

    def of(commands: bytes) -> bytes:
        (tmp_path / "input").write_bytes(commands)
        words = (program, tier, tmp_path / "input", tmp_path / "output")
        done = MACHINES[name].run(*words)
        if done.returncode == NO_SUCH_TIER:
            pytest.skip(f"this processor has no {tier}")
        assert done.returncode == 0, (done.returncode, done.stderr)
        return (tmp_path / "output").read_bytes()

    return of


def numbers(*values: int) -> bytes:
    """As the program reads them."""
    return struct.pack(f"<{len(values)}q", *values)


def array(tensor: Tensor | None) -> bytes:
    """A tensor, with what stands behind it in its memory."""
    if tensor is None:
        return numbers(0)
    storage = tensor.untyped_storage()
    size = storage.nbytes() - tensor.storage_offset() * tensor.element_size()
    return numbers(size) + ctypes.string_at(tensor.data_ptr(), size)


def described(matrix: KernelMatrix) -> bytes:
    """A matrix, field by field."""
    c, scales = matrix.c, matrix.scales
    parts = (matrix.values, matrix.mask, matrix.offsets, matrix.scale)
    groups = (None, None) if scales is None else (scales.code, scales.exponent)
    head = numbers(c.rows, c.columns, c.words, c.stride, c.type, c.group, c.of_four)
    return head + b"".join(array(part) for part in (*parts, *groups))


def product(command: int, matrix: KernelMatrix, x: Tensor) -> bytes:
    """A command to multiply."""
    return numbers(command) + described(matrix) + numbers(TYPES[x.dtype], len(x)) + array(x.clone())


def tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """What the program wrote."""
    return torch.frombuffer(bytearray(data), dtype=dtype)


def matrices(shape: tuple[int, int], sparsity: float | None) -> list[tuple[KernelMatrix, Tensor]]:
    """One of every kind of values, each with the same in float64."""
    found = [example(*shape, values, sparsity) for values in VALUES]
    kinds = (sparsity,) if sparsity is None else (sparsity, "2:4")
    return found + [example_of_codes(*shape, group, kind) for kind in kinds for group in GROUPS]


def integers(matrix: KernelMatrix) -> bool:
    """Whether activations are rounded for it."""
    return matrix.dtype == torch.int8 or matrix.group is not None


def assert_products(run: Run, asked: list[tuple[int, KernelMatrix, Tensor, Tensor]]) -> None:
    """Commands, matrices, the same dense, activations: all products are right."""
    output = run(b"".join(product(command, matrix, x) for command, matrix, _, x in asked))
    for _, matrix, dense, x in asked:
        size = len(x) * matrix.rows * x.element_size()
        got = tensor(output[:size], x.dtype).view(len(x), matrix.rows).double()
        output = output[size:]
        shares = "spread" if matrix.group is None else "consecutive"
        seen = rounded_to_bytes(x.float(), shares) if integers(matrix) else x.double()
        error = (got - bitmask_product(seen, dense)).abs()
        limit = 2e-6 if x.dtype == torch.float32 else 5e-3
        assert float((error / (seen.abs() @ dense.abs().T + 1e-30)).max()) < limit
    assert not output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.5, 0.95])
def test_products_of_few_tokens(run: Run, shape, sparsity) -> None:
    asked = []
    for matrix, dense in matrices(shape, sparsity):
        for batch in range(1, 9):
            x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch))
            asked += [(LINEAR, matrix, dense, x), (LINEAR, matrix, dense, x.bfloat16())]
    assert_products(run, asked)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_products_of_prompts(run: Run, shape, sparsity) -> None:
    asked = []
    for matrix, dense in matrices(shape, sparsity):
        for tokens in (1, 9, 17, 63):
            x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
            asked += [(PROMPT, matrix, dense, x), (PROMPT, matrix, dense, x.bfloat16())]
    assert_products(run, asked)


def test_tiles_are_the_matrix_bit_for_bit(run: Run) -> None:
    for sparsity in (None, 0.5):
        for matrix, dense in matrices((23, 130), sparsity):
            command = numbers(EXPAND) + described(matrix) + numbers(5, 23)
            dtype = torch.bfloat16 if integers(matrix) else matrix.dtype
            tile = tensor(run(command), dtype).view(18, matrix.words * 64)[:, :130].double()
            if matrix.scale is not None:
                tile *= matrix.scale.double()[5:23, None]
            assert torch.equal(tile, dense[5:23])


def test_not_a_number_stays_one(run: Run) -> None:
    x = torch.zeros(2, 70)
    x[1, 3] = float("nan")
    for matrix, _ in matrices((4, 70), 0.5):
        y = tensor(run(product(LINEAR, matrix, x)), torch.float32).view(2, 4)
        assert y[1, 1:].isnan().all()
        assert torch.equal(y[0], torch.zeros(4))


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("prompt", [1, 87])
def test_attention(run: Run, dtype: torch.dtype, prompt: int) -> None:
    oracle = replace(oracle_of(6, 2, 20, rotary=0), scale=0.25, softcap=5.0)
    q, k, v = a_text(oracle, 90)
    vectors = torch.cat([q, k, v, torch.zeros_like(q)], 1)
    command = numbers(ATTEND, TYPES[dtype], 6, 2, 20, prompt)
    got = tensor(run(command + array(vectors)), torch.float32).view(90, 16, 20)[:, 10:]
    wanted = oracle(q, k, v, rounding(dtype))
    # queries and shares may be rounded to bfloat16 as well
    assert float((got.double() - wanted).norm() / wanted.norm()) < 6e-3


def test_silu(run: Run) -> None:
    gate, up = torch.linspace(-100, 100, 333), torch.linspace(-3, 3, 333)
    got = tensor(run(numbers(SILU) + array(gate) + array(up)), torch.float32)
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("processor", "tier"),
    [("max", "neon-i8mm"), ("cortex-a76", "neon"), ("cortex-a72", "none")],
)
def test_an_arm_processor_decides(programs, processor: str, tier: str) -> None:
    command = [MACHINES["linux-arm"].emulator[0], "-cpu", processor, programs("linux-arm")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip() == tier


@pytest.mark.parametrize(
    ("processor", "tier"), [("Haswell", "avx2"), ("Nehalem", "none"), ("Haswell,-bmi2", "none")]
)
def test_an_x86_processor_decides(tmp_path: Path, processor: str, tier: str) -> None:
    gcc, qemu = shutil.which("gcc"), shutil.which("qemu-x86_64")
    if not gcc or not qemu or platform.machine() != "x86_64":
        pytest.skip("needs gcc for x86 and qemu-x86_64 (Debian: qemu-user)")
    program = Path(__file__).with_name("kernel_program.c")
    command = [
        gcc, "-static", "-std=gnu11", "-O1", f"-I{CSRC}", "-o", str(tmp_path / "program"),
        *map(str, [*sorted(CSRC.glob("*.c")), program]), "-lpthread", "-lm",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    asked = [qemu, "-cpu", processor, str(tmp_path / "program")]
    output = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip() == tier
