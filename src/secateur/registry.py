"""One registry for every kind of part that can be plugged in.

A part enters its registry in one of three ways:

    @scores.register("wanda")            # a decorator, in a file of the registry's own package
    @scores.register("my-score")         # the same decorator, in a user's own module
    [project.entry-points."secateur.scores"]   # an installed plug-in: my-score = "package.module"

Files of the registry's own package are imported the first time a name is looked up, so a new
file is found without editing any list.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from secateur.errors import RecipeError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint naming what `name` may have been meant to be, and all that there is.

    Example:
        >>> from secateur.registry import did_you_mean
        >>> did_you_mean("wand", ["magnitude", "ria", "wanda"])
        "did you mean 'wanda'? available: magnitude, ria, wanda"
    """
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{hint}available: {', '.join(known)}"


class Registry(Generic[T]):
    """Names for the parts of one kind.

    Args:
        kind: what a part is called in messages, for example "score".
        package: the package whose files hold the parts; imported on first look-up.
        plural: what several parts are called; `kind` with an s if None. Installed plug-ins name
            their modules in the entry points `secateur.PLURAL`.
    """

    def __init__(self, kind: str, package: str, plural: str | None = None) -> None:
        self.kind, self.package = kind, package
        self.plural = plural or f"{kind}s"
        self._parts: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Enter the decorated part under `name`; a name can be taken once.

        Raises:
            RecipeError: another part already has this name.
        """

        def enter(part: T) -> T:
            taken = self._parts.get(name)
            if taken is not None and repr(taken) != repr(part):
                raise RecipeError(
                    f"two {self.plural} are named {name!r}: {taken!r} and {part!r}",
                    remedy="register one of them under another name",
                )
            self._parts[name] = part
            return part

        return enter

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._parts:
            raise RecipeError(
                f"unknown {self.kind} {name!r}", remedy=did_you_mean(name, self.names())
            )
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._parts

    def describe(self, part: object) -> str:
        """The name of a part with its parameters, for people.

        Example:
            >>> from secateur.sparsity.scores import scores
            >>> scores.describe(scores["obs"](damping=0.01))
            'obs, damping 0.01'
        """
        self._load()
        name = next((n for n, known in self._parts.items() if known is type(part)), None)
        words = [name or type(part).__name__]
        for field in fields(part) if is_dataclass(part) else ():
            value = getattr(part, field.name)
            if value is not None and not is_dataclass(value):
                words.append(f"{field.name.replace('_', ' ')} {value}")
        return ", ".join(words)

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._parts)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("_"):  # private; a library that is no module of Python
                continue
            importlib.import_module(f"{self.package}.{module.name}")
        for plug_in in entry_points(group=f"secateur.{self.plural}"):
            plug_in.load()
