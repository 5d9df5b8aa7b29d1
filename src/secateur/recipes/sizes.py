"""Sizes with units, such as `90MiB`: the type of every option that is a number of bytes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

UNITS = {
    **{f"{letter}B": 1000**power for power, letter in enumerate(("", "k", "M", "G", "T"))},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}


def bytes_of(size: int | str) -> int:
    """The bytes of a size.

    Args:
        size: a number of bytes, or a number with a unit. Upper and lower case are the same.

    Raises:
        ValueError: it is no size; the message names the units.

    Example:
        >>> from secateur.recipes.sizes import bytes_of
        >>> bytes_of("90MiB"), bytes_of("6e9"), bytes_of(4096)
        (94371840, 6000000000, 4096)
    """
    if isinstance(size, int):
        return size
    units = {name.lower(): factor for name, factor in UNITS.items()}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-z]*)\s*", size.lower())
    if found is None or (found[2] or "b") not in units:
        raise ValueError(
            f"must be a number of bytes, or a number with a unit ({', '.join(UNITS)}), such as 6GiB"
        )
    return round(float(found[1]) * units[found[2] or "b"])


def checked(size: Any) -> Any:
    """The same size, if it is one.

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, float) and size.is_integer():  # 6e9 in YAML
        size = int(size)
    if isinstance(size, str) or (isinstance(size, int) and size < 0):
        bytes_of(str(size))
    return size


def positive(size: Any) -> Any:
    """The same size, if it is more than 0 bytes.

    Raises:
        ValueError: it is not.
    """
    size = checked(size)
    if isinstance(size, int | str) and bytes_of(size) == 0:
        raise ValueError("must be more than 0 bytes")
    return size


Size = Annotated[int | str, BeforeValidator(positive)]
"""More than 0 bytes. The recipe keeps what the user wrote; `bytes_of` gives the bytes."""

SizeOrZero = Annotated[int | str, BeforeValidator(checked)]
"""0 bytes or more."""
