"""Several calibration texts with weights, in one line: `code.jsonl=2,math.jsonl=1,c4`."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import RecipeError


def parts_of(source: str) -> tuple[tuple[str, float], ...]:
    """The texts that a source names, each with its weight; 1 where none is given.

    The name of a file that exists is one text, whatever characters it has.

    Raises:
        RecipeError: a text has no name, is named twice, or its weight is not above 0.

    Example:
        >>> from secateur.calibration.mix import parts_of
        >>> parts_of("code.jsonl=2,c4")
        (('code.jsonl', 2.0), ('c4', 1.0))
    """
    if ("," not in source and "=" not in source) or Path(source).expanduser().exists():
        return ((source, 1.0),)
    found: dict[str, float] = {}
    for part in source.split(","):
        name, has_weight, written = part.strip().rpartition("=")
        name = name if has_weight else written
        try:
            weight = float(written) if has_weight else 1.0
        except ValueError:
            weight = -1.0
        if not name or name in found or not 0 < weight < float("inf"):
            what = "names a text twice" if name in found else "is no text with a weight above 0"
            raise RecipeError(
                f"{part.strip()!r} {what}",
                where="calibration",
                remedy="write texts with commas between them, each with =WEIGHT if you like: "
                "code.jsonl=2,math.jsonl=1",
            )
        found[name] = weight
    return tuple(found.items())


def texts_of(source: str) -> list[str]:
    """The texts that a source names, without their weights."""
    return [name for name, _ in parts_of(source)]


def shares(count: int, weights: tuple[float, ...]) -> list[int]:
    """Divide a number of windows by weights; the largest remainders get the rest.

    Example:
        >>> from secateur.calibration.mix import shares
        >>> shares(10, (2.0, 1.0, 1.0))
        [5, 3, 2]
    """
    exact = [count * weight / sum(weights) for weight in weights]
    found = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in order[: count - sum(found)]:
        found[i] += 1
    return found
