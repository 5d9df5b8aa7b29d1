"""What torchrun tells a process about its place. Imports no torch: every command reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import RecipeError

REMEDY = "start with torchrun --nproc-per-node N -m secateur …, or unset WORLD_SIZE and RANK"


@dataclass(frozen=True)
class Launched:
    """The place of a process among those that were launched together.

    Attributes:
        rank: number of the process, from 0.
        count: number of processes.
        place: number of the process on its machine.
        here: number of processes on its machine.
        address: the machine of the first process.
        port: the port of the store there.
    """

    rank: int = 0
    count: int = 1
    place: int = 0
    here: int = 1
    address: str = ""
    port: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Launched:
        """Read the variables that torchrun and PyTorch's operators for clusters set.

        Raises:
            RecipeError: a variable is missing, or is no such number.
        """
        if "WORLD_SIZE" not in environment:
            return cls()
        count = _number(environment, "WORLD_SIZE", 1, 2**20)
        if count == 1:
            return cls()
        rank = _number(environment, "RANK", 0, count - 1)
        here = _number(environment, "LOCAL_WORLD_SIZE", 1, count, default=1)
        place = _number(environment, "LOCAL_RANK", 0, here - 1, default=0)
        address, port = environment.get("MASTER_ADDR", ""), 0
        if not address:
            raise RecipeError("WORLD_SIZE is set and MASTER_ADDR is not", remedy=REMEDY)
        port = _number(environment, "MASTER_PORT", 1, 2**16 - 1)
        return cls(rank, count, place, here, address, port)


def _number(
    environment: Mapping[str, str], name: str, low: int, high: int, default: int | None = None
) -> int:
    """Read a whole number from low to high.

    Raises:
        RecipeError: it is missing and has no default, or is no such number.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal() or not low <= int(text) <= high:
        found = "is not set" if text is None else f"is {text!r}"
        raise RecipeError(f"{name} {found}; a number from {low} to {high} is needed", remedy=REMEDY)
    return int(text)
