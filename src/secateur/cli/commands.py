"""The commands: one function for each verb. Nothing that takes long to import is loaded before it
runs.

`secateur.cli.commands:NAME` is the command of the verb NAME. It is made when the command line
looks it up, so that only the recipe of that verb is imported. Its flags and its help come from the
recipe, and its work is the step of the verb.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from inspect import Parameter as Argument
from inspect import Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_origin

from cyclopts import Group, Parameter, Token

from secateur.errors import RecipeError, SecateurError
from secateur.progress import Progress, Silent
from secateur.recipes.options import GROUPS, Flag, Heading, Option, options_of, run_options_of
from secateur.recipes.reading import recipe_from_flags, takes_several
from secateur.recipes.verbs import VERBS, imported

if TYPE_CHECKING:
    from secateur.recipes.deploy import ChatRecipe, GenerateRecipe
    from secateur.reporting.fields import Result
    from secateur.steps.generate import Conversation


def __getattr__(name: str) -> Callable[..., None]:
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make_command(name)


def _show_progress() -> contextlib.AbstractContextManager[Progress]:
    from secateur.cli.progress import show_progress  # needs rich

    return show_progress()


def _show_nothing() -> contextlib.AbstractContextManager[Progress]:
    return contextlib.nullcontext(Silent())


HEADINGS = {name: Group(name, sort_key=place) for place, name in enumerate(GROUPS)}

SET_HELP = "Set any key of the recipe; a dot stands between a section and its key."
SET = Option("set", (), list[str], False, "none", Heading.OUTPUT, SET_HELP, Flag(value="KEY=VALUE"))
JSON_HELP = "Print the result as JSON on stdout."
JSON = Option("json", (), bool, False, "a table", Heading.OUTPUT, JSON_HELP, Flag())
QUIET_HELP = "Show neither progress nor log on stderr, only errors."
QUIET = Option("quiet", (), bool, False, "off", Heading.OUTPUT, QUIET_HELP, Flag(short="-q"))


def make_command(verb: str) -> Callable[..., None]:
    """Make a function whose signature has a flag for every option of a verb's recipe."""
    kind = imported(VERBS[verb].recipe)
    of_recipe = [option for option in options_of(kind) if not option.flag.hidden]
    shown = [*of_recipe, *run_options_of(kind), JSON, QUIET]
    if of_recipe:
        shown.append(SET)
    meant = {alias: option for option in shown for alias in option.flag.aliases}
    hidden = [
        _parameter(replace(option, name=name, flag=replace(option.flag, short=None)), show=False)
        for name, option in meant.items()
    ]
    signature = Signature(sorted([*map(_parameter, shown), *hidden], key=lambda p: p.kind))

    def run_command(*words: str, **flags: Any) -> None:
        given = dict(signature.bind_partial(*words, **flags).arguments)
        for alias in meant.keys() & given.keys():
            name = meant[alias].name
            if name in given:
                raise RecipeError(f"{_dashed(alias)} is {_dashed(name)}; give one of them")
            given[name] = given.pop(alias)
        assignments = given.pop("set", None) or ()
        as_json, quiet = (given.pop(name, False) for name in ("json", "quiet"))
        recipe, call = recipe_from_flags(kind, given, assignments)
        if not call.get("dry_run"):
            needed = any(o.path == ("output",) and o.default == "required" for o in of_recipe)
            if needed and recipe.output is None:
                raise RecipeError("no output folder", remedy="add --output DIR")
        model = str(getattr(recipe, "model", ""))
        if not Path(model).exists():
            from secateur.models.hub import refuse_out_of_reach  # after everything that is quick

            refuse_out_of_reach(model)
        call |= {"as_json": as_json} if VERBS[verb].streams else {}
        with contextlib.redirect_stderr(OnlyErrors(sys.stderr) if quiet else sys.stderr):
            showing = _show_nothing if quiet else _show_progress
            result = VERBS[verb].run(recipe, call, showing, command=True)
        if result is not None:
            print_result(result, as_json=as_json, made=getattr(recipe, "output", None))
            if result.exit_code:
                sys.exit(result.exit_code)

    function: Any = run_command
    function.__signature__ = signature
    function.__doc__ = f"{VERBS[verb].summary}\n\n{VERBS[verb].more}".rstrip()
    function.__name__ = verb
    return run_command


def _parameter(option: Option, *, show: bool = True) -> Argument:
    """The parameter of a command for an option.

    Everything except bools is text here. `recipe_from_flags` reads it, so that one error lists all
    faults. What is not given is not passed on.
    """
    is_bool, choices = option.type is bool, option.choices
    shown = Parameter(
        help=option.help if option.required else option.about,
        group=HEADINGS[option.group],
        metavar=None if is_bool else option.word,
        show=show,
        show_default=False,
        converter=None if is_bool else _as_text,  # a `Path` would turn ./DIR into DIR
        completer=(lambda _: choices) if choices else None,
        allow_repeating=None if takes_several(option) else True,
    )
    text: Any = Path if option.is_path else str
    kind: Any = bool if is_bool else list[text] if takes_several(option) else text
    if option.is_word:
        return Argument(
            option.name,
            Argument.POSITIONAL_ONLY,
            default=Argument.empty if option.required else None,
            annotation=Annotated[kind if option.required else kind | None, shown],
        )
    off = option.flag.off or (f"no_{option.name}" if option.default == "on" else None)
    named = Parameter(
        name=[_dashed(option.name), *([option.flag.short] if option.flag.short else [])],
        negative=_dashed(off) if off else (),
    )
    return Argument(
        option.name,
        Argument.KEYWORD_ONLY,
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


def print_result(result: Result, *, as_json: bool, made: str | None = None) -> None:
    """Write a result to stdout: tables for people, or one JSON document.

    Args:
        result: of a verb.
        as_json: which of the two.
        made: the output of the verb, for an error.
    """
    with _printing(made):
        if as_json:
            print(json.dumps(result.to_json(), indent=2))
        else:
            result.show()


@contextlib.contextmanager
def _printing(made: str | None = None) -> Iterator[None]:
    """Write to stdout; see `print_result`.

    Raises:
        SecateurError: stdout takes nothing.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SecateurError(
            f"stdout cannot be written: {error.strerror}",
            where=None if made is None else f"the result is whole, in {made}",
            remedy="send stdout to another place",
        ) from error


class OnlyErrors(io.TextIOBase):
    """Takes the place of stderr: writes errors there, and throws everything else away."""

    def __init__(self, stderr: TextIO) -> None:
        self.stderr = stderr

    def write(self, text: str) -> int:
        """Write an error; `print` passes its line break separately."""
        if text.startswith("error: "):
            self.stderr.write(f"{text}\n")
        return len(text)


CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def carry_out_generate(recipe: GenerateRecipe, *, as_json: bool) -> None:
    """Continue a prompt: text while it is generated, then the speed.

    With `as_json` everything is written at the end.
    """
    conversation = _open(recipe, recipe.json_schema)
    prompt = recipe.prompt
    if prompt is None:
        if sys.stdin.isatty():
            print(
                "Write the text and end it with Ctrl-D; `secateur chat` holds a conversation.",
                file=sys.stderr,
            )
        prompt = sys.stdin.read().rstrip("\n")
    if as_json:
        print_result(conversation.say(prompt), as_json=True)
        return
    _print_defaults(conversation)
    begun = conversation.chat

    def show(text: str) -> None:
        nonlocal begun
        _write(text if begun else prompt + text)
        begun = True

    made = conversation.say(prompt, show)
    _write("\n")
    print(made.account, file=sys.stderr)


def carry_out_chat(recipe: ChatRecipe, *, as_json: bool) -> None:
    """Answer line by line until the input ends."""
    conversation = _open(recipe)
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # `input` can then edit and recall lines
            import_module("readline")
        kind = "" if conversation.chat else "no chat template: each line is a text to continue. "
        print(f"{recipe.model}: {kind}{CHAT_HELP}", file=sys.stderr)
    if not as_json:
        _print_defaults(conversation)
    while (line := _next_line(typed)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.forget()
        elif line.startswith("/"):
            print(CHAT_HELP, file=sys.stderr)
        elif line:
            _reply(conversation, line, as_json)


def _open(recipe: GenerateRecipe | ChatRecipe, json_schema: str | None = None) -> Conversation:
    """Load the model."""
    from secateur.runtime.sampling import sampling_with
    from secateur.steps.generate import Conversation

    sampling_with({}, recipe.drawing())  # a bad number is an error before any work
    return Conversation(recipe, json_schema)


def _print_defaults(conversation: Conversation) -> None:
    """Say on stderr which sampling options come from the model."""
    if conversation.taken:
        taken = ", ".join(f"{name} {value}" for name, value in conversation.taken.items())
        print(f"from the model's generation_config.json: {taken}", file=sys.stderr)


def _next_line(typed: bool) -> str | None:
    """The next line of the input; None at its end."""
    try:
        if typed:
            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
    return line.strip() if line else None


def _reply(conversation: Conversation, prompt: str, as_json: bool) -> None:
    """Answer one message. Ctrl-C stops the answer. An error does not end the conversation."""
    try:
        made = conversation.say(prompt, (lambda text: None) if as_json else _write)
    except KeyboardInterrupt:
        print("\n(stopped; the conversation does not keep this answer)", file=sys.stderr)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        if as_json:
            print_result(made, as_json=True)
            return
        _write("\n")
        print(made.account, file=sys.stderr)


def _write(text: str) -> None:
    with _printing():
        sys.stdout.write(text)
