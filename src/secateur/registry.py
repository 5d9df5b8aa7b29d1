"""One registry for every kind of part that can be plugged in.

A part enters its registry in one of three ways:

    @score(requires={"column_norm"})     # a function, in a file of the registry's own package
    @solvers.register("my-solver")       # a class, there or in a module of your own
    [project.entry-points."secateur.scores"]   # an installed plug-in: my-score = "package.module"

Files of the registry's own package are imported the first time a name is looked up, so a new
file is found without editing any list.

A part that is one function (`from_function`) has the function's keyword-only parameters. A part
with state or several methods is a frozen dataclass, and its fields are the parameters. Both say in
annotations which values are allowed, and `CheckedPart` checks them:

    steps: Count = 10
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, make_dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from math import prod
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from secateur.errors import RecipeError

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

Count = Annotated[int, Field(ge=1)]
"""A parameter that is a whole number, 1 or more."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A parameter that is a number above 0."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A parameter that is a number, 0 or more."""


def one_of(*allowed: int | str) -> AfterValidator:
    """Annotates a parameter that is one of a few numbers or names."""
    *most, last = map(str, allowed)

    def check(value: int | str) -> int | str:
        if value not in allowed:
            raise ValueError(f"it should be {', '.join(most)} or {last}")
        return value

    return AfterValidator(check)


def float32_bytes(shape: tuple[int, ...], copies: int = 1) -> int:
    """Bytes of float32 tensors of this shape, for what a part declares of its memory."""
    return 4 * copies * prod(shape)


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

    def from_function(
        self, function: Function, base: type, method: str = "__call__", **declared: Any
    ) -> Function:
        """Enter a part that is one function, under the function's name; return the function.

        The part is a frozen dataclass. Its fields are those of `base`, and the keyword-only
        parameters of the function. Its `method` calls the function with all other arguments.

        Args:
            function: its name may have `_` where the name of the part has `-`.
            base: what parts of this kind share.
            method: the name of the method that is the function.
            **declared: further attributes of the part, such as `requires`.
        """
        signature = inspect.signature(function, eval_str=True)
        own = [x for x in signature.parameters.values() if x.kind is x.KEYWORD_ONLY]
        shared = {field.name for field in fields(base)} if is_dataclass(base) else set()
        kind: Any = make_dataclass(
            function.__name__,
            [(x.name, x.annotation, x.default) for x in own if x.name not in shared],
            bases=(base,),
            namespace={
                "__doc__": function.__doc__,
                "__reduce__": lambda part: (_made_again, (function, vars(part))),
                method: _Call(function, [x.name for x in own]),
                **declared,
            },
            frozen=True,
        )
        kind.__module__ = function.__module__
        vars(function)["part"] = kind
        self.register(function.__name__.replace("_", "-"))(kind)
        return function

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


class _Call:
    """A method of a part that calls a function with the part's parameters.

    The function itself is called, without a Python frame between it and the caller.
    """

    def __init__(self, function: Callable[..., Any], parameters: list[str]) -> None:
        self.function, self.parameters = function, parameters

    def __get__(self, part: Any, kind: type) -> Callable[..., Any]:
        if part is None:
            return self.function
        return partial(self.function, **{name: getattr(part, name) for name in self.parameters})


def _made_again(function: Any, parameters: Mapping[str, Any]) -> Any:
    """The part of a function: pickle finds the function by its name, not the class of the part."""
    return function.part(**parameters)


class CheckedPart:
    """What all parts share that are dataclasses: their annotations say which values they allow."""

    def __post_init__(self) -> None:
        """Check the parameters (`parameters_of`).

        Raises:
            RecipeError: a parameter has another type than its annotation, or is out of range.
        """
        for name, value in parameters_of(type(self), vars(self)).items():
            object.__setattr__(self, name, value)  # frozen for everybody else


def parameters_of(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a part has parameters for; a whole number becomes a float where one is meant.

    Raises:
        RecipeError: a parameter has another type than its annotation, or is out of range.
    """
    found = {}
    for name, adapter in _adapters(kind).items():
        if name in values:
            try:
                found[name] = adapter.validate_python(values[name], strict=True)
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Value error, ")
                remedy = said.replace("Input should", "it should")
                raise RecipeError(f"{name} is {values[name]!r}", remedy=remedy) from None
    return found


@cache
def _adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    """What checks each parameter of a part."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(kind)}
