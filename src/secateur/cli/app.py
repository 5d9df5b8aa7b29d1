"""The application with all verbs. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import BoundArguments
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from cyclopts import App, CycloptsError, Group, Token, UnknownOptionError, UnusedCliTokensError

import secateur
from secateur.errors import SecateurError, VerificationError
from secateur.recipes.verbs import STAGES, VERBS, look_for


def make_app() -> App:
    """Build the command line. The recipe of a verb is imported when the verb is called."""
    app = App(
        name="secateur",
        help="The open toolkit for pruning large language models.",
        help_format="plaintext",
        help_flags=["-h", "--help"],
        help_epilogue="Exit codes: 0 done, 1 the run failed, 2 bad usage or recipe, 3 a "
        "verification failed, 130 interrupted.",
        version=f"secateur {secateur.__version__}",
        group_commands=Group("Options", sort_key=len(STAGES)),
        exit_on_error=False,
        print_error=False,
    )
    headings = {stage: Group(stage, sort_key=place) for place, stage in enumerate(STAGES)}
    for place, verb in enumerate(VERBS.values()):
        app.command(
            f"secateur.cli.commands:{verb.name}",
            name=verb.name,
            help=f"{verb.summary}\n\n{verb.more}".rstrip(),
            group=headings[verb.stage],
            sort_key=place,
        )
    app.register_install_completion_command(
        help="Complete verbs, options and files with the Tab key, in the shell that runs this."
    )
    return app


def main() -> None:
    """Run a command. Every exception becomes a message and an exit code."""
    _show_what_can_be_shown()
    try:
        command, bound = _parsed(sys.argv[1:])
        command(*bound.args, **bound.kwargs)
        sys.exit(0)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except SecateurError as error:
        _exit_with(error)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):  # another one must not end the end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        from secateur.cli.errors import to_error

        _exit_with(to_error(error))


def _drop_output() -> None:
    """Throw away what stdout did not take: Python would try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_what_can_be_shown() -> None:
    """Print a question mark for a character that stdout cannot show, as Windows' pipes cannot.

    A width that is no width counts as unknown. A stream that is closed reads and writes nothing:
    else the next file that is opened would have its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if not re.fullmatch(r"0*[1-9][0-9]*", os.environ.get("COLUMNS", "")):
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _parsed(words: Sequence[str]) -> tuple[Callable[..., Any], BoundArguments]:
    """The command that a command line names, and its arguments."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SecateurError(
            "the working folder has been removed", remedy="go to a folder that exists"
        ) from None
    if words and words[0] not in VERBS and not words[0].startswith("-"):
        look_for(words[0])
    app = make_app()
    try:
        command, bound, left, _ = app.parse_known_args(list(words))
    except CycloptsError as error:
        from secateur.cli.errors import usage_error  # needs pydantic, and --help does not

        raise usage_error([error], error.command_chain) from None
    if left:
        from secateur.cli.errors import usage_error

        known = app[words[0]].assemble_argument_collection()
        flags = [Token(keyword=word, source="cli") for word in left if word.startswith("-")]
        unknown = [UnknownOptionError(token=flag, argument_collection=known) for flag in flags]
        raise usage_error(unknown or [UnusedCliTokensError(unused_tokens=left)], words[:1])
    return command, bound


def _exit_with(error: SecateurError) -> NoReturn:
    """Print an error on stderr, with --json also on stdout, and exit with its code."""
    if "--json" in sys.argv:
        kind = type(error).__name__
        fields: dict[str, Any] = {"kind": kind, "what": error.what}
        fields |= {"where": error.where, "remedy": error.remedy}
        if isinstance(error, VerificationError) and error.measured:
            fields["measured"] = error.measured
        try:
            print(json.dumps({"error": fields}), flush=True)
        except OSError:
            _drop_output()
    text = f"error: {error}".encode("utf-8", "backslashreplace")  # names may hold lone surrogates
    print(text.decode(), file=sys.stderr)
    sys.exit(error.exit_code)
