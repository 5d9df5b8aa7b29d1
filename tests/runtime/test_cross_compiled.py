"""The library for other systems, as `setup.py` builds it with zig, and where it can be, loaded.

That nothing is exported but the public functions is read in the tables of the files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "src" / "secateur" / "runtime" / "kernels" / "csrc"
PROGRAM = Path(__file__).with_name("library_program.c")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ziglang") is None, reason="needs zig (pip install ziglang)"
    ),
]

X86, ARM = ("avx512bf16", "avx512", "avx2"), ("neon-i8mm", "neon")
TARGETS = {
    "aarch64-macos": ARM,
    "x86_64-macos": X86,
    "x86_64-windows-gnu": X86,
    "aarch64-windows-gnu": ARM,
    "aarch64-linux-gnu": ARM,
}
"""zig's names of machines, and the names of the tiers that their libraries must hold."""

Tables = tuple[set[str], set[str]]
"""The exported names, and the libraries that the system has to load first."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The library for a target; each is built once. Warnings are errors."""
    folder = tmp_path_factory.mktemp("cross")

    def of(target: str) -> Path:
        place = folder / target
        if not place.exists():
            command = [sys.executable, "setup.py", "-q", "build_ext", "--target", target]
            done = subprocess.run(
                [*command, "--build-lib", str(place), "--build-temp", str(folder / "temp")],
                cwd=ROOT,
                env={**os.environ, "CFLAGS": "-Wall -Wextra -Werror"},
                capture_output=True,
                text=True,
            )
            assert list(place.rglob("_native*")), done.stderr
        (found,) = (file for file in place.rglob("*") if file.is_file())
        return found

    return of


def public_functions() -> set[str]:
    """The functions of `secateur.h`."""
    return set(re.findall(r"(sct_\w+)\(", (CSRC / "secateur.h").read_text(encoding="utf-8")))


def text_at(data: bytes, place: int) -> str:
    return data[place : data.index(b"\0", place)].decode()


def tables_of_windows(data: bytes) -> Tables:
    """Of a PE file for 64 bits."""
    header = struct.unpack_from("<I", data, 0x3C)[0]
    assert data[header : header + 4] == b"PE\0\0"
    count, optional = (struct.unpack_from("<H", data, header + at)[0] for at in (6, 20))
    sections = [
        struct.unpack_from("<8x4I", data, header + 24 + optional + 40 * i) for i in range(count)
    ]

    def place(address: int) -> int:
        for size, begin, stored, offset in sections:
            if begin <= address < begin + max(size, stored):
                return int(address - begin + offset)
        raise AssertionError(f"{address:x} is in no section")

    exports, _, imports = struct.unpack_from("<3I", data, header + 24 + 112)
    at = place(exports)
    number, names = (struct.unpack_from("<I", data, at + offset)[0] for offset in (24, 32))
    addresses = struct.unpack_from(f"<{number}I", data, place(names))
    needed, at = set(), place(imports)
    while name := struct.unpack_from("<I", data, at + 12)[0]:
        needed.add(text_at(data, place(name)).lower())
        at += 20
    return {text_at(data, place(address)) for address in addresses}, needed


def tables_of_macos(data: bytes) -> Tables:
    """Of a Mach-O file for 64 bits."""
    magic, commands = struct.unpack_from("<I12xI", data, 0)
    assert magic == 0xFEEDFACF
    exported, needed, at = set(), set(), 32
    for _ in range(commands):
        kind, size = struct.unpack_from("<II", data, at)
        if kind == 0xC:  # LC_LOAD_DYLIB
            needed.add(text_at(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif kind == 0x2:  # LC_SYMTAB
            symbols, count, texts, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(count):
                name, flags = struct.unpack_from("<IB", data, symbols + 16 * i)
                external, private, defined = flags & 0x01, flags & 0x10, flags & 0x0E == 0x0E
                if external and not private and defined:
                    exported.add(text_at(data, texts + name).removeprefix("_"))
        at += size
    return exported - {"__dso_handle", "_mh_dylib_header"}, needed


def tables_of_linux(data: bytes) -> Tables:
    """Of an ELF file for 64 bits."""
    assert data[:5] == b"\x7fELF\x02"
    at, size, count = (
        struct.unpack_from("<Q", data, 0x28)[0],
        *struct.unpack_from("<HH", data, 0x3A),
    )
    sections = [struct.unpack_from("<4xI16xQQI", data, at + size * i) for i in range(count)]
    exported, needed = set(), set()
    for kind, offset, length, link in sections:
        texts = sections[link][1] if link else 0
        if kind == 11:  # SHT_DYNSYM
            for symbol in range(offset, offset + length, 24):
                name, info, other, section = struct.unpack_from("<IBBH", data, symbol)
                if info >> 4 == 1 and section != 0 and other & 3 == 0:
                    exported.add(text_at(data, texts + name))
        elif kind == 6:  # SHT_DYNAMIC
            for entry in range(offset, offset + length, 16):
                tag, value = struct.unpack_from("<QQ", data, entry)
                if tag == 1:
                    needed.add(text_at(data, texts + value))
    return exported, needed


READERS = {".dll": tables_of_windows, ".dylib": tables_of_macos, ".so": tables_of_linux}
SYSTEM = {
    ".dll": r"kernel32\.dll|api-ms-win-crt-.*\.dll|msvcrt\.dll|ntdll\.dll",
    ".dylib": r"/usr/lib/libSystem\.B\.dylib",
    ".so": r"libc\.so\.6|libm\.so\.6|libpthread\.so\.0|ld-linux-aarch64\.so\.1",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_library_exports_its_public_functions_and_needs_only_the_system(built, target) -> None:
    file = built(target)
    data = file.read_bytes()
    exported, needed = READERS[file.suffix](data)
    assert exported == public_functions()
    assert not [name for name in needed if not re.fullmatch(SYSTEM[file.suffix], name)]
    assert all(tier.encode() + b"\0" in data for tier in TARGETS[target])


def test_the_system_finds_the_library_by_its_name(built) -> None:
    """`library.py` looks for these names in its own folder."""
    from secateur.runtime.kernels.library import SUFFIXES

    for target in TARGETS:
        file = built(target)
        assert file.name.startswith("_native.")
        assert file.suffix in SUFFIXES
        assert file.parent.parts[-3:] == ("secateur", "runtime", "kernels")


RUNS = {
    "x86_64-windows-gnu": ("wine", (), "wine (Debian: wine64, wine)", {"avx2"}),
    "aarch64-linux-gnu": (
        "qemu-aarch64",
        ("-cpu", "max", "-L", "/usr/aarch64-linux-gnu"),
        "qemu-aarch64 (Debian: qemu-user, libc6-dev-arm64-cross)",
        {"neon", "neon-i8mm"},
    ),
}


@pytest.mark.parametrize("target", RUNS)
def test_a_library_is_loaded_and_multiplies(built, tmp_path: Path, target: str) -> None:
    name, options, packages, tiers = RUNS[target]
    emulator = shutil.which(name)
    if emulator is None:
        pytest.skip(f"needs {packages}")
    program = tmp_path / "program.exe"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-O1", f"-I{CSRC}"]
    subprocess.run([*compiler, "-o", str(program), str(PROGRAM)], check=True, capture_output=True)
    done = subprocess.run(
        [emulator, *options, str(program), str(built(target))],
        env={**os.environ, "WINEDEBUG": "-all", "WINEPREFIX": str(tmp_path / "wine")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert tiers <= set(done.stdout.split())
