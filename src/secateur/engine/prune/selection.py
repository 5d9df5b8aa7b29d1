"""Selects the linears to prune, and their sparsities: names, globs and exceptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from secateur.errors import RecipeError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Selection:
    """Globs over the full names of linears, for example `model.layers.*.mlp.*`.

    Attributes:
        include: a linear is pruned if one of these matches.
        exclude: a linear stays dense if one of these matches.
        overrides: fixed sparsities of matching linears. The last match counts; 0 keeps a linear
            dense.
        starts: likewise, but an allocation may change the sparsity.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)

    def selects(self, name: str) -> bool:
        """Whether a linear is pruned at all."""
        chosen = any(fnmatchcase(name, glob) for glob in self.include)
        return chosen and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def override(self, name: str) -> float | None:
        """The fixed sparsity of a linear, if any."""
        return last_match(self.overrides, name)

    def asked(self, name: str, sparsity: float) -> float:
        """The sparsity of a linear if the model's sparsity is `sparsity`."""
        if not self.selects(name):
            return 0.0
        own = self.override(name)
        if own is None:
            own = last_match(self.starts, name)
        return sparsity if own is None else own

    def check(self, names: Iterable[str], others: Iterable[str] = ()) -> None:
        """Refuse globs that match nothing, because they are spelling mistakes.

        Args:
            names: of all linears.
            others: further globs to check.

        Raises:
            RecipeError: there are such globs; the message lists all of them.
        """
        names = list(names)
        globs = [*self.include, *self.exclude, *self.overrides, *self.starts, *others]
        refuse_idle_globs(globs, names)
        if not any(self.selects(n) for n in names):
            raise RecipeError(
                "include and exclude leave no linear to prune",
                remedy="loosen them; `secateur inspect MODEL` lists the names",
            )


def refuse_idle_globs(globs: Iterable[str], names: Sequence[str], kind: str = "linear") -> None:
    """Refuse globs that match no name, because they are spelling mistakes.

    Args:
        globs: to check.
        names: full names, at least one.
        kind: of what the names are.

    Raises:
        RecipeError: lists all such globs, and shows three names and a glob that works.
    """
    idle = [g for g in globs if not any(fnmatchcase(n, g) for n in names)]
    if not idle:
        return
    near = get_close_matches(idle[0], names, n=1, cutoff=0.0)
    shown = [*near, *(name for name in names if name not in near)][:3]
    end = near[0].rpartition(".")[2] if kind == "linear" else ".".join(near[0].split(".")[-2:])
    raise RecipeError(
        f"no {kind} matches {', '.join(map(repr, idle))}",
        remedy=f"full names are {', '.join(shown)}, …; '*.{end}' matches that {kind} in every "
        "layer; `secateur inspect MODEL --layer 0` lists the names of one",
    )


def last_match(values: Mapping[str, Value], name: str) -> Value | None:
    """The value of the last glob that matches a name, if any does."""
    own = [value for glob, value in values.items() if fnmatchcase(name, glob)]
    return own[-1] if own else None
