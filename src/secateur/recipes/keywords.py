"""The options of a recipe as keywords of a Python function, with types and a line of help each."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

from secateur.recipes.options import Option, options_of, run_options_of
from secateur.recipes.reading import AnyRecipe, build_recipe, nested
from secateur.recipes.section import Section

__all__ = ["plain", "python_type", "recipe_of", "takes_options_of", "type_text"]

P, R = ParamSpec("P"), TypeVar("R")

INDENT, WIDTH = " " * 8, 100


def takes_options_of(kind: type[Section]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show the options of a recipe in the signature and the help of a function.

    The function takes them as `**options`. What it declares by itself stays as it is. None means
    that an option is not given.

    Args:
        kind: of the recipe.
    """
    shown = [*options_of(kind), *run_options_of(kind)]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        added = [option for option in shown if option.name not in taken]
        keywords = [parameter_of(option) for option in added]
        mutable: Any = function
        mutable.__signature__ = signature.replace(
            parameters=sorted([*own, *keywords], key=lambda parameter: parameter.kind)
        )
        function.__doc__ = documented(function.__doc__ or "", added)
        return function

    return decorate


def parameter_of(option: Option) -> inspect.Parameter:
    """The keyword of an option."""
    kind = python_type(option)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.required else None,
        annotation=kind if option.required else kind | None,
    )


def python_type(option: Option) -> Any:
    """The type of the values that Python may give for an option."""
    return widened(option.type, str | Path if option.is_path else str)


def widened(kind: Any, text: Any) -> Any:
    """A type of a field as Python gives it: any sequence for a tuple, any mapping for a dict."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is str:
        return text
    if isinstance(kind, type) and issubclass(kind, Section):
        return functools.reduce(operator.or_, (*kind.alone, Mapping[str, Any]))
    if origin in (tuple, list):
        return Sequence[widened(inner[0], text)]
    if origin is dict:
        return Mapping[inner[0], inner[1]]
    return kind


def documented(doc: str, added: Sequence[Option]) -> str:
    """A docstring with a line for each of these in place of `**options`."""
    lines = [
        textwrap.fill(
            f"{option.name}: {option.about}",
            WIDTH,
            initial_indent=INDENT,
            subsequent_indent=INDENT + "    ",
            break_on_hyphens=False,
        )
        for option in added
    ]
    return re.sub(r" *\*\*options: .*(\n {12}.*)*", lambda _: "\n".join(lines), doc, count=1)


def recipe_of(
    kind: type[AnyRecipe], values: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[AnyRecipe, dict[str, Any]]:
    """The recipe that keywords describe, and the options of the call.

    Args:
        kind: of the recipe.
        values: what the function takes by its own parameters; None is not given.
        options: all other keywords.

    Raises:
        RecipeError: listing every fault.
    """
    given = {k: plain(v) for k, v in {**values, **options}.items() if v is not None}
    run = {o.name: given.pop(o.name) for o in run_options_of(kind) if o.name in given}
    return build_recipe(kind, nested(kind, given)), run


def plain(value: Any) -> Any:
    """A value as YAML has it: text for a path, and a dict for any mapping."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def type_text(kind: Any) -> str:
    """A type as it is written in a stub."""
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(type_text(part) for part in get_args(kind))
    if kind is types.NoneType:
        return "None"
    if isinstance(kind, str):
        return kind
    if get_origin(kind) is None:
        return getattr(kind, "__name__", str(kind))
    return str(kind).replace("typing.", "").replace("collections.abc.", "").replace("pathlib.", "")
