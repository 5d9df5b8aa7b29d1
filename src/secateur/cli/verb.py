"""Turn the options of a recipe into a command with flags and help that prints its result."""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_origin

from cyclopts import Group, Parameter, Token

from secateur.errors import RecipeError
from secateur.parallel.launched import Launched
from secateur.recipes.options import (
    GROUPS,
    OUTPUT,
    Flag,
    Option,
    example_of,
    options_of,
    run_options_of,
)
from secateur.recipes.reading import recipe_from_flags, takes_several
from secateur.recipes.verbs import VERBS, imported

if TYPE_CHECKING:
    from secateur.reporting.tables import Result

HEADINGS = {name: Group(name, sort_key=place) for place, name in enumerate(GROUPS)}

SET = Option(
    "set",
    (),
    list[str],
    required=False,
    default="none",
    group=OUTPUT,
    help="Set any key of the recipe, for example {example}.",
    flag=Flag(value="KEY=VALUE"),
)
JSON = Option(
    "json",
    (),
    bool,
    required=False,
    default="a table",
    group=OUTPUT,
    help="Print the result as JSON on stdout.",
    flag=Flag(),
)
QUIET = Option(
    "quiet",
    (),
    bool,
    required=False,
    default="off",
    group=OUTPUT,
    help="Show neither progress nor log on stderr, only errors.",
    flag=Flag(short="-q"),
)


def make_command(
    verb: str,
    run: Callable[..., Result | None],
    exit_code: Callable[[Any], int] = lambda result: 0,
    streams: bool = False,
    check: Callable[[Any], None] = lambda recipe: None,
) -> Callable[..., None]:
    """Make a function whose signature has a flag for every option of a verb's recipe.

    Args:
        verb: the name of the verb.
        run: takes the recipe and the options of the call. Returns a result, or None if another
            process has it.
        exit_code: returns the exit code for a result.
        streams: whether `run` writes its result itself; it then takes `as_json`.
        check: refuses a recipe with a fault before the model is looked up. It must be quick.
    """
    kind = imported(VERBS[verb].recipe)
    of_recipe = [option for option in options_of(kind) if not option.flag.hidden]
    shown = [*of_recipe, *run_options_of(kind), JSON, QUIET]
    if of_recipe:
        shown.append(replace(SET, help=SET.help.format(example=example_of(kind))))
    signature = inspect.Signature(sorted(map(_parameter, shown), key=lambda p: p.kind))

    def run_command(*words: str, **flags: Any) -> None:
        given = dict(signature.bind_partial(*words, **flags).arguments)
        _refuse_several(verb, given.get("dry_run", False))
        assignments = given.pop("set", None) or ()
        as_json, quiet = (given.pop(name, False) for name in ("json", "quiet"))
        recipe, call = recipe_from_flags(kind, given, assignments)
        if not call.get("dry_run"):
            needed = any(o.path == ("output",) and o.default == "required" for o in of_recipe)
            if needed and recipe.output is None:
                raise RecipeError("no output folder", remedy="add --output DIR")
        check(recipe)
        from secateur.models.hub import refuse_out_of_reach  # after everything that is quick

        refuse_out_of_reach(str(getattr(recipe, "model", "")))
        call |= {"as_json": as_json} if streams else {}
        with redirect_stderr(OnlyErrors(sys.stderr) if quiet else sys.stderr):
            result = run(recipe, **call)
        if result is not None:
            print_result(result, as_json=as_json)
            if exit_code(result):
                sys.exit(exit_code(result))

    function: Any = run_command
    function.__signature__ = signature
    function.__doc__ = VERBS[verb].about
    function.__name__ = verb
    return run_command


def print_result(result: Result, *, as_json: bool) -> None:
    """Write a result to stdout: tables for people, or one JSON document."""
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        result.show()


class OnlyErrors(io.TextIOBase):
    """Takes the place of stderr: writes errors there, and throws everything else away."""

    def __init__(self, stderr: TextIO) -> None:
        self.stderr = stderr

    def write(self, text: str) -> int:
        """Write an error; `print` passes its line break separately."""
        if text.startswith("error: "):
            self.stderr.write(f"{text}\n")
        return len(text)


def _refuse_several(verb: str, dry_run: bool) -> None:
    """Refuse a verb that several processes would carry out several times."""
    count = Launched.read(os.environ).count
    if count > 1:  # torch would print the stack of every connection that closes
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if count > 1 and (dry_run or not VERBS[verb].together):
        able = ", ".join(name for name, each in VERBS.items() if each.together)
        words = f"secateur {verb}" + " --dry-run" * dry_run
        raise RecipeError(
            f"`{words}` does not work with several processes yet, and there are {count}",
            remedy=f"start it without torchrun; {able} can share their work",
        )


def _parameter(option: Option) -> inspect.Parameter:
    """The parameter of a command for an option.

    Everything except bools is text here. `recipe_from_flags` reads it, so that one error lists all
    faults. What is not given is not passed on.
    """
    is_bool, choices = option.type is bool, option.choices
    shown = Parameter(
        help=option.help if option.required else option.about,
        group=HEADINGS[option.group],
        metavar=None if is_bool else option.word,
        show_default=False,
        converter=None if is_bool else _as_text,  # a `Path` would turn ./DIR into DIR
        completer=(lambda _: choices) if choices else None,
        allow_repeating=None if takes_several(option) else True,
    )
    text: Any = Path if option.is_path else str
    kind: Any = bool if is_bool else list[text] if takes_several(option) else text
    if option.is_word:
        return inspect.Parameter(
            option.name,
            inspect.Parameter.POSITIONAL_ONLY,
            default=inspect.Parameter.empty if option.required else None,
            annotation=Annotated[kind if option.required else kind | None, shown],
        )
    off = option.flag.off or (f"no_{option.name}" if option.default == "on" else None)
    named = Parameter(
        name=[_dashed(option.name), *([option.flag.short] if option.flag.short else [])],
        negative=_dashed(off) if off else (),
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_bool else None,
        annotation=Annotated[kind if is_bool else kind | None, shown, named],
    )


def _as_text(kind: Any, tokens: Sequence[Token]) -> Any:
    """The text of an option as it was written; several if it may be repeated."""
    words = [token.value for token in tokens]
    return words if get_origin(kind) is list else words[0]


def _dashed(name: str) -> str:
    """A name with dashes, as in a flag."""
    return "--" + name.replace("_", "-")
