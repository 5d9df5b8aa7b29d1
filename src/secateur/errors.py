"""Every error Secateur raises on purpose, and the exit code each one ends a command with.

    SecateurError                exit 1  the run failed
    ├── RecipeError              exit 2  options or recipe do not make sense
    ├── SourceError              exit 2  the named model, text or data set cannot be had
    ├── PatternError             exit 2  this pattern cannot hold this sparsity, score or shape
    │   └── ShapeError           exit 2  a matrix does not divide into groups or blocks
    ├── CheckpointError          exit 1  a file is damaged, incomplete or of an unsafe kind
    ├── ArchitectureError        exit 1  the model is not a decoder this library understands
    │   └── ExportError          exit 2  the target of an export cannot hold this model
    ├── NumericalError           exit 1  NaN, Inf or a matrix that cannot be factorised
    ├── KernelError              exit 1  a kernel is missing or of another version
    ├── MemoryBudgetError        exit 1  the plan does not fit the memory or disk that is there
    ├── RankError                exit *  another process of the run failed; its own exit code
    └── VerificationError        exit 3  the result is not what was asked for

`secateur.cli.errors` has two more: Ctrl-C (exit 130), and a fault in secateur itself (exit 1).

Exit code 2 means that another command would work: an option, a name or a pattern has to change,
whether the command alone shows it or the model that it names. Exit code 1 means that the command
makes sense, and a file, the model, the machine or the run stopped it.

Each message says what happened (with numbers), where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

DISTRIBUTION = "secateur-llm"
"""The name of the package for pip. The import and the command are `secateur`."""


def install_extra(extra: str) -> str:
    """How to install this package with an extra.

    From a checkout: there is no release of `DISTRIBUTION` yet, and the package index knows the name
    `secateur` as somebody else's. With the first release this becomes `DISTRIBUTION[extra]`.
    """
    return f"pip install '.[{extra}]' in a checkout of secateur"


def first_line(error: Exception) -> str:
    """The first line that an error of another library says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SecateurError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what happened, with the numbers.
        where: the tensor, file or option concerned.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if remedy:
            parts.append(f"  remedy: {remedy}")
        super().__init__("\n".join(parts))

    def reword(self, change: Callable[[str], str]) -> None:
        """Change the words of all three parts."""
        where, remedy = (
            None if text is None else change(text) for text in (self.where, self.remedy)
        )
        SecateurError.__init__(self, change(self.what), where=where, remedy=remedy)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Give the errors raised in this context a place, unless they have one."""
    try:
        yield
    except SecateurError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=where, remedy=error.remedy) from error.__cause__


class RecipeError(SecateurError):
    """Options or recipe do not make sense; all faults found are listed at once."""

    exit_code = 2

    @classmethod
    def of(
        cls, faults: Sequence[str], *, where: str | None = None, remedy: str | None = None
    ) -> RecipeError:
        """One error for all faults: a single one stands alone, several are a list."""
        [first, *more] = faults
        what = f"{len(faults)} faults:\n    " + "\n    ".join(faults) if more else first
        return cls(what, where=where, remedy=remedy)


class SourceError(SecateurError):
    """The named model, text or data set cannot be had."""

    exit_code = 2


class PatternError(SecateurError):
    """The pattern cannot hold this sparsity, or cannot be used with this score or scope."""

    exit_code = 2


class ShapeError(PatternError):
    """A matrix does not divide into the groups or blocks of a pattern."""


class CheckpointError(SecateurError):
    """A checkpoint file is damaged, incomplete or of an unsafe kind."""


class ArchitectureError(SecateurError):
    """The model is not a decoder this library understands."""


class ExportError(ArchitectureError):
    """The target of an export would compute or tokenize this model differently."""

    exit_code = 2


class NumericalError(SecateurError):
    """NaN or Inf where there may be none, or a matrix that cannot be factorised."""


class KernelError(SecateurError):
    """A compiled kernel is missing, of another version, or cannot run on this processor."""


class MemoryBudgetError(SecateurError):
    """The plan does not fit the memory or disk that is there, or memory has ended during a run."""


class RankError(SecateurError):
    """Another process of the run has failed, and this one cannot go on without it."""


class VerificationError(SecateurError):
    """A result does not pass its check: a file, a count, or a bound of the recipe.

    Attributes:
        measured: what was measured, as JSON values; the message has the same numbers.
    """

    exit_code = 3
    measured: Sequence[Mapping[str, object]] = ()
