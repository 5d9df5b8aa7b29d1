"""What pyproject.toml cannot say: one wheel serves every version of Python, and how C is compiled.

The compiled part is plain C that ctypes loads. It uses nothing of Python, so only the platform
matters. Without a compiler the wheel is built without it.

    python setup.py build_ext --target x86_64-windows-gnu     for another machine, by zig
"""

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WINDOWS = {"AMD64": "x86_64-windows-gnu", "ARM64": "aarch64-windows-gnu"}
"""zig's name of a Windows machine, by Python's name."""


class AnyPython(bdist_wheel):
    """Names the wheel by its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


class PlainC(build_ext):
    """Builds a library that is no module of Python.

    zig compiles for other machines, and on Windows: Microsoft's compiler does not know GNU C, and
    GCC does not align the stack there for AVX.
    """

    user_options: ClassVar = [
        *build_ext.user_options,
        ("target=", None, "another machine, by zig's name: aarch64-macos, x86_64-windows-gnu, ..."),
    ]

    def initialize_options(self) -> None:
        """Only Windows has a target by itself."""
        super().initialize_options()
        self.target = WINDOWS.get(platform.machine()) if sys.platform == "win32" else None
        self.foreign = False

    def finalize_options(self) -> None:
        """Another machine's library has another name."""
        super().finalize_options()
        self.foreign = "target" in self.distribution.get_option_dict("build_ext")

    def get_ext_filename(self, fullname: str) -> str:
        """The file of the library."""
        if not self.foreign:
            return super().get_ext_filename(fullname)
        kinds = {"windows": ".dll", "macos": ".dylib"}
        kind = next((kinds[name] for name in kinds if name in self.target), ".so")
        return os.path.join(*fullname.split(".")) + kind

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None by name: there is no `PyInit`."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile and link everything."""
        if self.target is None:
            super().build_extension(ext)
            return
        if importlib.util.find_spec("ziglang") is None:
            raise CompileError("the kernels are compiled by zig here: pip install ziglang")
        made = Path(self.get_ext_fullpath(ext.name))
        made.parent.mkdir(parents=True, exist_ok=True)
        options = [*ext.extra_compile_args, *shlex.split(os.environ.get("CFLAGS", ""))]
        command = ["cc", "-target", self.target, "-shared", "-s", *options, "-o", str(made)]
        command = [sys.executable, "-m", "ziglang", *command, *ext.sources]
        if subprocess.run(command).returncode != 0:
            raise CompileError(f"zig could not compile the kernels for {self.target}")
        for left in (*made.parent.glob("*.lib"), *made.parent.glob("*.pdb")):
            left.unlink()  # for programs that are linked with the library


setup(cmdclass={"bdist_wheel": AnyPython, "build_ext": PlainC})
