"""What pyproject.toml cannot say: one wheel serves every version of Python.

The compiled part is plain C that ctypes loads. It uses nothing of Python, so only the platform
matters. Without a compiler the wheel is built without it.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class AnyPython(bdist_wheel):
    """Names the wheel by its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"bdist_wheel": AnyPython})
