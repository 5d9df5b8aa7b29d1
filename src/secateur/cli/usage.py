"""Turn commands that cannot be parsed into errors with what, where and remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
)

from secateur.errors import RecipeError
from secateur.recipes.reading import unknown_name


def usage_error(app: App, error: CycloptsError, verbs: Sequence[str]) -> RecipeError:
    """The error for a command that cannot be parsed.

    Args:
        app: the command line.
        error: the exception of cyclopts.
        verbs: names of all verbs.
    """
    if isinstance(error, UnknownCommandError):
        [verb, *_] = error.unused_tokens or [""]
        known = unknown_name("verb", verb, verbs).partition("; known:")[0]
        return RecipeError(
            f"{verb}: unknown option" if verb.startswith("-") else f"{verb!r}: {known}",
            remedy="secateur --help lists the verbs",
        )
    where = " ".join(["secateur", *(error.command_chain or ())])
    remedy = f"{where} --help lists its options"
    if isinstance(error, UnknownOptionError) and error.command_chain:
        word = error.token.keyword or error.token.value
        return unknown_options(app, error.command_chain[0], [word])
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.keyword or error.argument.name
        value = "a value is missing" if name.startswith("-") else "missing"
        about = error.argument.parameter.help
        return RecipeError(f"{name}: {value}", where=where, remedy=f"give it: {about}")
    if isinstance(error, CoercionError) and error.token is not None:
        given = f"{error.token.keyword} {error.token.value}"
        return RecipeError(f"{given}: must be true or false", where=where, remedy=remedy)
    error.verbose = False
    return RecipeError(str(error), where=where, remedy=remedy)


def unknown_options(app: App, verb: str, left: Sequence[str]) -> RecipeError:
    """The error for words that no option takes.

    Args:
        app: the command line.
        verb: the verb of the command.
        left: the unused words.
    """
    known = [
        name.lstrip("-")
        for argument in app[verb].assemble_argument_collection()
        for name in argument.names
        if name.startswith("--")
    ]
    return RecipeError.of(
        list(_faults_of(left, known)),
        where=f"secateur {verb}",
        remedy=f"secateur {verb} --help lists its options",
    )


def _faults_of(left: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """A line for every unknown option, and for every word that belongs to no option."""
    flags = {flag.replace("-", "_"): flag for flag in known}
    before = ""
    for word in left:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            told = unknown_name("option", name.lstrip("-").replace("-", "_"), list(flags))
            for plain, flag in flags.items():
                told = told.replace(repr(plain), f"--{flag}")
            yield f"{name}: {told.partition('; known:')[0]}"  # --help lists them in groups
            before = "" if equals else name
        elif before:  # the word may be the option's value
            before = ""
        else:
            yield f"{word!r}: unexpected; a list takes its flag before each value"
