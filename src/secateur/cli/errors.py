"""Turn whatever stops a command into an error with what, where and remedy.

That is a command line that cannot be parsed, and any exception that no verb has turned into a
`SecateurError`. An `OSError` is a problem of this machine: a disk, a permission, a name. So is the
end of memory. Any other exception is a fault in secateur. Its traceback goes into a file, and the
message names the file.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
)

from secateur.errors import DISTRIBUTION, MemoryBudgetError, RecipeError, SecateurError
from secateur.recipes.options import options_of, run_options_of
from secateur.recipes.reading import takes_several, unknown_name
from secateur.recipes.verbs import VERBS, imported

REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place for --output",
    errno.EDQUOT: "free some of your quota, or choose another place for --output",
    errno.EACCES: "choose a place where you may read and write, or change its permissions",
    errno.EPERM: "choose a place where you may read and write, or change its permissions",
    errno.EROFS: "choose a place on a file system that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "this is a folder: name a file",
    errno.ENOENT: "check the path; another program may have removed the file",
    errno.EMFILE: "close other programs, or raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or the network drive reports a fault: check it, and use another one",
    errno.ENOMEM: "close other programs, or lower --max-memory",
}
"""Remedies for common errors of the operating system, by error number."""


class InternalError(SecateurError):
    """A fault in secateur itself."""


class UserInterruptError(SecateurError):
    """The user pressed Ctrl-C."""

    exit_code = 130


def usage_error(app: App, error: CycloptsError, verbs: Sequence[str]) -> RecipeError:
    """The error for a command that cannot be parsed.

    Args:
        app: the command line.
        error: the exception of cyclopts.
        verbs: names of all verbs.
    """
    if isinstance(error, UnknownCommandError):
        [verb, *_] = error.unused_tokens or [""]
        known = _named("verb", verb, verbs)
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
    options = options_of(imported(VERBS[verb].recipe))
    words = " and ".join(option.flag_text for option in options if option.is_word) or "nothing"
    lists = [option.flag_text for option in options if takes_several(option) and not option.is_word]
    why = f"unexpected; `secateur {verb}` takes {words} without a flag"
    why += f", and a list repeats its flag: {lists[0]} A {lists[0]} B" if lists else ""
    remedy = f"secateur {verb} --help lists its options"
    return RecipeError.of(
        list(_faults_of(left, known, why)), where=f"secateur {verb}", remedy=remedy
    )


def _named(what: str, name: str, known: Sequence[str]) -> str:
    """An unknown name and a similar one; --help lists the others in groups."""
    return re.split("; (?:known:|docs)", unknown_name(what, name, known))[0]


def _faults_of(left: Sequence[str], known: Sequence[str], why: str) -> Iterator[str]:
    """A line for every unknown option, and for every word that belongs to no option."""
    flags = {flag.replace("-", "_"): flag for flag in known}
    before = ""
    for word in left:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            message = _named("option", name.lstrip("-").replace("-", "_"), list(flags))
            for plain, flag in flags.items():
                message = message.replace(repr(plain), f"--{flag}")
            yield f"{name}: {message}"
            before = "" if equals else name
        elif before:  # the word may be the option's value
            before = ""
        else:
            yield f"{word!r}: {why}"


def to_error(error: BaseException) -> SecateurError:
    """The error for an exception that no verb has expected."""
    from secateur.engine.plan import is_shortage  # imports torch

    if isinstance(error, KeyboardInterrupt):
        return UserInterruptError("interrupted", remedy=_how_to_continue(sys.argv[1:]))
    if isinstance(error, OSError) and error.errno is not None:
        names = [error.filename, error.filename2]
        where = " → ".join(os.fsdecode(name) for name in names if isinstance(name, (str, bytes)))
        return SecateurError(
            f"the operating system refuses: {error.strerror or error}",
            where=where or None,
            remedy=REMEDIES.get(error.errno or 0, "mend what it complains of, and run again"),
        )
    if is_shortage(error):
        first = (str(error).strip() or "no memory").splitlines()[0]
        return MemoryBudgetError(
            f"memory has ended: {first[:200]}",
            remedy=f"close other programs, or lower the sizes of the run; "
            f"{_how_to_continue(sys.argv[1:])}",
        )
    file = write_log(error)
    said = [type(error).__name__, *str(error).strip().splitlines()]
    return InternalError(
        f"this is a fault in secateur: {': '.join(said[:2])[:200]}",
        where=f"the full traceback is in {file}" if file else "the traceback is above",
        remedy="please open an issue of the project, with that text and the command, and say what "
        "you expected",
    )


def _how_to_continue(words: list[str]) -> str:
    """The message after Ctrl-C: what is kept, and the command that continues.

    >>> from secateur.cli.errors import _how_to_continue
    >>> _how_to_continue(["prune", "my model", "--output", "DIR", "--restart"])
    "finished work is kept; continue with: secateur prune 'my model' --output DIR --resume"
    >>> _how_to_continue(["evaluate", "DIR"])
    'nothing is kept; start again with: secateur evaluate DIR'

    Args:
        words: the words of the command line, without the program's name.
    """
    verb = words[0] if words else ""
    recipe = imported(VERBS[verb].recipe) if verb in VERBS else None
    if recipe is None or "resume" not in {option.name for option in run_options_of(recipe)}:
        return f"nothing is kept; start again with: {shlex.join(['secateur', *words])}"
    words = [*(word for word in words if word not in ("--restart", "--resume")), "--resume"]
    return f"finished work is kept; continue with: {shlex.join(['secateur', *words])}"


def write_log(error: BaseException) -> Path | None:
    """Write the traceback into a file, and return its path.

    The file goes to the first writable folder of these: the work folder of the run, secateur's
    state folder, the folder for temporary files. If none is writable, the traceback goes to stderr
    and the result is None.
    """
    from secateur.models.cache import cache_folder

    lines = [f"command: {shlex.join(sys.argv)}", f"folder: {os.getcwd()}"]
    lines += [f"{name}: {_installed(name)}" for name in (DISTRIBUTION, "torch", "transformers")]
    lines += [f"python: {platform.python_version()}", f"system: {platform.platform()}", ""]
    text = "\n".join(lines) + "\n" + "".join(traceback.format_exception(error))
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    folders = [*_work_folders(sys.argv), _temporary_folder()]
    with suppress(SecateurError):  # who has no home has no cache
        folders.insert(-1, cache_folder() / "faults")
    for folder in filter(None, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / name
            file.write_text(text, encoding="utf-8", newline="\n", errors="backslashreplace")
        except OSError:
            continue
        return file.absolute()
    sys.stderr.write(text)
    return None


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _work_folders(arguments: list[str]) -> list[Path]:
    """The existing work folders of the run that a command line names."""
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--output", "-o"):
            folder = Path(f"{value}.partial") / "work"
            return [folder] if folder.is_dir() else []
    return []


def _temporary_folder() -> Path | None:
    """The folder for temporary files; None if the system has no writable one."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return None
