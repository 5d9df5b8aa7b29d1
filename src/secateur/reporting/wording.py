"""Numbers and names as text, in the same form everywhere."""

from __future__ import annotations

from pathlib import Path


def bare_name(name: str) -> str:
    """The name of a model or text without its folder. Hub ids stay whole."""
    return Path(name).name if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def percent(fraction: float, digits: int = 0) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.{digits}f}\u00a0%"  # a no-break space keeps the sign with its number


def binary_size(nbytes: float) -> str:
    """A size in KiB, MiB or GiB; small ones with decimals.

    Example:
        >>> from secateur.reporting.wording import binary_size
        >>> binary_size(257 * 2**20), binary_size(6.5e6), binary_size(90_000), binary_size(3e9)
        ('257 MiB', '6.2 MiB', '88 KiB', '2.79 GiB')
    """
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:,.2f} GiB"
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.0f} KiB"
    mebibytes = nbytes / 2**20
    return f"{mebibytes:.{0 if mebibytes >= 10 else 1}f} MiB"


def signed(value: float, digits: int) -> str:
    """A difference with its sign; no sign if it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def counted(count: int, name: str) -> str:
    """A count with its noun, in singular or plural."""
    return f"{count} {name}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """A duration as text: `8 s`, `2 min 05 s`, `1 h 12 min`.

    Example:
        >>> from secateur.reporting.wording import duration
        >>> duration(8.4), duration(125), duration(4321)
        ('8 s', '2 min 05 s', '1 h 12 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def time_range(least: float, most: float) -> str:
    """The two ends of an estimated time, in one unit: `20 to 60 s`, `2 to 5 min`, `3 to 8 h`.

    Example:
        >>> from secateur.reporting.wording import time_range
        >>> time_range(21, 64), time_range(70, 290), time_range(8000, 25000)
        ('20 to 60 s', '1 to 5 min', '2 to 7 h')
    """
    size, unit = (1, "s") if most < 100 else (60, "min") if most < 6000 else (3600, "h")
    low, high = least / size, most / size
    if unit == "s" and low >= 10:  # an estimate is not accurate to single seconds
        low, high = 10 * round(low / 10), 10 * round(high / 10)
    return f"{low:.0f} to {max(high, 1):.0f} {unit}"


def without_blank_lines(text: str) -> str:
    """A model's text for a terminal: pruned models write many empty lines.

    Example:
        >>> from secateur.reporting.wording import without_blank_lines
        >>> without_blank_lines("Paris.\\n\\n \\nIt is")
        'Paris.\\nIt is'
    """
    return "\n".join(line for line in text.splitlines() if line.strip())
