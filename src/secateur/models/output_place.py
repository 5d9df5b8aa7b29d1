"""Whether something can be written at a place, tried before any work is done for it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from secateur.errors import RecipeError

__all__ = ["check_writable"]

LONGEST_ENDING = ".partial"
"""What runs put behind the name of the output while they work."""


def check_writable(output: Path, *, file: bool = False) -> None:
    """Refuse an output that could not be made; nothing is left behind.

    Permissions are not computed but tried: quotas, read-only file systems and the rights of root
    are known to the system alone.

    Args:
        output: the folder or file that will be made, with the folders it lies in.
        file: whether it is a file, which may be there.

    Raises:
        RecipeError: it is a symbolic link, its name is too long, or its folder cannot be written.
    """
    linked = None
    try:
        if output.is_symlink() and not file:
            linked = os.readlink(output)
        os.lstat(output if file else output.with_name(output.name + LONGEST_ENDING))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise refusal(error, output) from None
    if linked is not None:
        raise RecipeError(
            f"the output is a symbolic link to {linked}",
            where=str(output),
            remedy="name a folder that is none, or remove the link",
        )
    folder = output.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if file and output.exists():
            with output.open("ab"):
                return
        with tempfile.TemporaryDirectory(prefix=".secateur-", dir=folder):
            pass
    except OSError as error:
        raise refusal(error, output) from None


def refusal(error: Exception, output: Path) -> RecipeError:
    """Why an output cannot be made, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    what, remedy = {
        errno.ENAMETOOLONG: ("the name of the output is too long", "choose a shorter name"),
        errno.ENOTDIR: ("the output would lie under a file", "choose another --output"),
        errno.EISDIR: ("the output is a folder, not a file", "name a file"),
        errno.ELOOP: ("the output lies behind symbolic links in a circle", "choose another one"),
        errno.ENOSPC: ("the disk is full", "free some space, or choose another --output"),
    }.get(
        number or 0,
        (
            f"the output cannot be written: {getattr(error, 'strerror', None) or error}",
            "choose a folder that you may write to, or change its permissions",
        ),
    )
    return RecipeError(what, where=str(output), remedy=remedy)
