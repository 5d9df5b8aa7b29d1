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
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

from cyclopts import CycloptsError

from secateur.errors import DISTRIBUTION, MemoryBudgetError, RecipeError, SecateurError
from secateur.recipes.options import run_options_of
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


def usage_error(errors: Sequence[CycloptsError], command: Sequence[str] | None) -> RecipeError:
    """The error for a command that cannot be parsed, in the words of cyclopts."""
    for error in errors:
        error.verbose = False
    where = " ".join(["secateur", *(command or ())])
    remedy = f"{where} --help lists what there is"
    return RecipeError.of([str(error) for error in errors], where=where, remedy=remedy)


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

    names = (DISTRIBUTION, "torch", "transformers")
    lines = [f"command: {shlex.join(sys.argv)}", f"folder: {os.getcwd()}"]
    lines += [f"{found.name}: {found.version}" for found in distributions() if found.name in names]
    lines += [f"python: {platform.python_version()}", f"system: {platform.platform()}", ""]
    text = "\n".join(lines) + "\n" + "".join(traceback.format_exception(error))
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    given = itertools.pairwise(sys.argv)
    outputs = (Path(f"{x}.partial") / "work" for flag, x in given if flag in ("--output", "-o"))
    folders = [work for work in outputs if work.is_dir()][:1]
    with suppress(SecateurError):  # who has no home has no cache
        folders.append(cache_folder() / "faults")
    with suppress(OSError):  # a system without a writable one
        folders.append(Path(tempfile.gettempdir()))
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / name
            file.write_text(text, encoding="utf-8", newline="\n", errors="backslashreplace")
        except OSError:
            continue
        return file.absolute()
    sys.stderr.write(text)
    return None
