"""Give a Python function the options of a recipe as keywords, each with its type and help."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import operator
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from secateur.errors import RecipeError, SecateurError
from secateur.progress import Progress, listener
from secateur.recipes import options as declared
from secateur.recipes.reading import AnyRecipe, build_call, nested
from secateur.recipes.verbs import VERBS, imported

P, R = ParamSpec("P"), TypeVar("R")

RECIPE_FILE = re.compile(r", ([\w ]+), or a recipe \(`\*\.yaml`\)")
"""What the help of a command says, and a Python function does not take."""

INDENT, WIDTH = " " * 8, 100
FUNCTION_HELP = """{about}

    Args:
{words}
        progress: receives every step.
        **options: the other options.

    Raises:
        SecateurError: what, where, and what to do.
    """
"""The help of a function that is made from its options."""
CALIBRATION_TEXT = "calibration"
"""The option that also takes the texts themselves: a list, or what yields them."""


def takes_options_of(kind: type[declared.Section]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Add the options of a recipe to the signature and the help of a function.

    The function receives them as `**options`. Parameters that the function declares itself stay
    as they are. None means that an option is not given.

    Args:
        kind: the class of the recipe.
    """
    shown = declared.all_options(kind)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        added = [option for option in shown if option.name not in taken]
        keywords = [_parameter_of(option) for option in added]
        mutable: Any = function
        mutable.__signature__ = signature.replace(
            parameters=sorted([*own, *keywords], key=lambda parameter: parameter.kind)
        )
        lines = "\n".join(_line_of(option.name, option.about) for option in added)
        doc = re.sub(
            r" *\*\*options: .*(\n {12}.*)*", lambda _: lines, function.__doc__ or "", count=1
        )
        function.__doc__ = doc
        return function

    return decorate


@functools.cache
def public_function(verb: str) -> Callable[..., Any]:
    """The Python function of a verb.

    Unless the verb has one of its own, it is made from the options of its recipe. Its help begins
    like that of the verb's step.
    """
    row = VERBS[verb]
    if row.function:
        own: Callable[..., Any] = imported(row.function)
        return own
    kind: type[declared.Recipe] = imported(row.recipe)
    step: Any = imported(row.step)
    words = [option for option in declared.options_of(kind) if option.required]

    def function(*given: Any, progress: Progress | None = None, **options: Any) -> Any:
        if len(given) > len(words):
            raise TypeError(f"{row.python}() takes {len(words)} arguments without a name")
        named = {word.name: value for word, value in zip(words, given, strict=False)}
        recipe, call = recipe_of(kind, named, options)
        showing: Any = partial(nullcontext, listener(progress))
        return row.run(recipe, call, showing)

    made: Any = function
    made.__name__ = made.__qualname__ = row.python
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(function).parameters
    returned = get_type_hints(getattr(step, "work", step))["return"]
    if row.plan:
        returned |= get_type_hints(imported(row.plan))["return"]
    made.__signature__ = inspect.Signature(
        [
            *(_parameter_of(word).replace(kind=positional) for word in words),
            parameters["progress"],
            parameters["options"],
        ],
        return_annotation=returned,
    )
    lines = [_line_of(word.name, RECIPE_FILE.sub(r" or \1", word.help)) for word in words]
    about, *_ = re.split(r"\n\n *(?:Args|Raises):", inspect.getdoc(step) or "")
    made.__doc__ = FUNCTION_HELP.format(
        about=textwrap.indent(about, " " * 4).strip(), words="\n".join(lines)
    )
    return takes_options_of(kind)(function)


def _parameter_of(option: declared.Option) -> inspect.Parameter:
    """The keyword parameter of an option."""
    kind = _widened(option.type, str | Path if option.is_path else str)
    if option.name == CALIBRATION_TEXT:
        kind |= Iterable[str]
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.required else None,
        annotation=kind if option.required else kind | None,
    )


def _widened(kind: Any, text: Any) -> Any:
    """The type for Python callers: any sequence for a tuple, any mapping for a dict."""
    kind = declared.without_none(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if kind is str:
        return text
    if isinstance(kind, type) and issubclass(kind, declared.Section):
        return functools.reduce(operator.or_, (*kind.alone, Mapping[str, Any]))
    if origin in (tuple, list):
        return Sequence[_widened(inner[0], text)]
    if origin is dict:
        return Mapping[inner[0], declared.without_none(inner[1])]
    return kind


def _line_of(name: str, about: str) -> str:
    """The line of a docstring about an option."""
    return textwrap.fill(
        f"{name}: {about}",
        WIDTH,
        initial_indent=INDENT,
        subsequent_indent=INDENT + "    ",
        break_on_hyphens=False,
    )


def recipe_of(
    kind: type[AnyRecipe], values: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[AnyRecipe, dict[str, Any]]:
    """Build a recipe from keywords. Returns it and the options of the call.

    Args:
        kind: the class of the recipe.
        values: values of the function's own parameters; None means not given.
        options: all other keywords.

    Raises:
        RecipeError: listing every fault.
    """
    given = {k: plain(v) for k, v in {**values, **options}.items() if v is not None}
    texts = given.get(CALIBRATION_TEXT)
    if isinstance(texts, Iterable) and not isinstance(texts, str | Mapping):
        given[CALIBRATION_TEXT] = str(_keep_texts(list(texts)))
    call = {o.name: given.pop(o.name) for o in declared.run_options_of(kind) if o.name in given}
    spelled = {option.path: option.name for option in declared.all_options(kind)}
    return build_call(kind, nested(kind, given), call, spelled=spelled)


def _keep_texts(texts: Sequence[Any]) -> Path:
    """Keep texts as a file of JSON lines in the cache, named after its content.

    So a run that reads them can be resumed and repeated.
    """
    from secateur.models.cache import cache_folder, writing_cache
    from secateur.runs.output import write_bytes

    kinds = {type(text).__name__ for text in texts if not isinstance(text, str)}
    if kinds or not any(text.strip() for text in texts):
        raise RecipeError(
            f"a list of texts holds {', '.join(sorted(kinds))}" if kinds else "the texts are empty",
            where="calibration",
            remedy="pass a list of strings, each of them a document",
        )
    if all(os.path.isfile(text) for text in texts):  # which says False for any long text
        raise RecipeError(
            "the texts are names of files",
            where="calibration",
            remedy=f"pass one name, or several as {','.join(f'{text}=1' for text in texts[:2])!r}",
        )
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    content = lines.encode("utf-8")
    file = cache_folder() / "texts" / f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not file.exists():
        with writing_cache(file.parent):
            write_bytes(file, content)
    return file


def refuse_unused(
    kind: type[AnyRecipe], options: Mapping[str, Any], unused: Iterable[str], why: str
) -> None:
    """Refuse keywords that a call would ignore.

    Args:
        kind: the class of the recipe.
        options: the keywords of the call; None and False mean not given.
        unused: names of the options that the call cannot use.
        why: the reason.

    Raises:
        RecipeError: names the first of them.
    """
    given = nested(kind, {k: v for k, v in options.items() if v is not None})
    for option in (option for option in declared.all_options(kind) if option.name in {*unused}):
        value: Any = given
        for key in option.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value not in (None, False):
            raise RecipeError(
                f"`{option.name}` would change nothing: {why}",
                remedy="leave it out, or name the folder of a checkpoint instead",
            )


def plain(value: Any) -> Any:
    """Convert a value to what YAML holds: text for a path, a dict for any mapping."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


@functools.cache
def naming_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let the errors of a public function name keywords where those of a command name flags."""

    @functools.wraps(function)
    def call(*words: P.args, **options: P.kwargs) -> R:
        try:
            return function(*words, **options)
        except SecateurError as error:
            error.reword(_with_keywords)
            raise

    return call


COMMAND = re.compile(r"(`?\bsecateur [a-z]+ [^`,;\n]*`?)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)( (?=[\d']))?")


def _with_keywords(text: str) -> str:
    """Write flags in the text of an error as keywords. Commands stay commands.

    Example:
        >>> from secateur.recipes.keywords import _with_keywords
        >>> _with_keywords("run `secateur decompress DIR --output OUT`, or use --tune-passes 1")
        'run `secateur decompress DIR --output OUT`, or use tune_passes=1'
    """
    parts = COMMAND.split(text.replace("--set ", ""))

    def keyword(flag: re.Match[str]) -> str:
        return flag[1].replace("-", "_") + ("=" if flag[2] else "")

    return "".join(part if n % 2 else FLAG.sub(keyword, part) for n, part in enumerate(parts))
