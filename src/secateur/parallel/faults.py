"""What ended a run of several processes: which of them, and why."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass

from secateur.errors import RankError, SecateurError


@dataclass(frozen=True)
class Fault:
    """The error that ended a run, as every process hears of it.

    Attributes:
        rank: the process that failed.
        host: its machine.
        what: what happened.
        where: the tensor, file or option concerned.
        remedy: what the user can do about it.
        exit_code: exit code of the command.
    """

    rank: int
    host: str
    what: str
    where: str | None = None
    remedy: str | None = None
    exit_code: int = 1

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Fault:
        """The fault of this process."""
        host = socket.gethostname()
        if isinstance(error, SecateurError):
            return cls(rank, host, error.what, error.where, error.remedy, error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, host, "it was interrupted", exit_code=130)
        first = next(iter(str(error).strip().splitlines()), "")
        return cls(rank, host, f"{type(error).__name__}: {first}"[:300])

    @classmethod
    def read(cls, text: str) -> Fault:
        """The fault in a text that `write` has made."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """The fault as text."""
        return json.dumps(asdict(self))

    def error(self) -> RankError:
        """The error for the other processes."""
        error = RankError(
            f"process {self.rank} of the run, on {self.host}, has ended: {self.what}",
            where=self.where,
            remedy=self.remedy,
        )
        error.exit_code = self.exit_code
        return error
