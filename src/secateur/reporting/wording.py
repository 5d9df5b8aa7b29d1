"""Numbers in words, the same way everywhere."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bare_name", "counted", "megabytes", "percent", "signed"]


def bare_name(name: str) -> str:
    """A model or a text without the way to its file; hub ids stay whole."""
    return Path(name).name if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def percent(fraction: float, digits: int = 0) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.{digits}f}\u00a0%"  # the sign stays with its number


def megabytes(size: float) -> str:
    """A size of files, in powers of ten as disks are sold."""
    return f"{size / 1e6:,.0f} MB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


def signed(value: float, digits: int) -> str:
    """A difference, with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def counted(count: int, name: str) -> str:
    """So many of something."""
    return f"{count} {name}{'s' * (count != 1)}"
