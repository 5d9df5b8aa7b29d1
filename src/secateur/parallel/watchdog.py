"""Notices that a process of a run has failed, has died or hangs, and tells all the others.

Processes that wait for each other cannot hear of an error: the sum that they wait for never comes.
So every process has a thread that counts up a number of its own in the store that all share. The
first process looks at the numbers of all others, and they look at its number. A number that stands
still for `SILENCE_SECONDS` is a fault. So is an error that a process reports itself. The first
fault counts, and all read it.

A process that hears of a fault has `GRACE_SECONDS` to end by itself: the sum that it waits for
fails when the connection to the failed process closes. Otherwise the thread ends it. A run may be
killed at any moment, so nothing is lost.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

from secateur.errors import RankError, SecateurError

if TYPE_CHECKING:
    from torch.distributed import Store


T = TypeVar("T")

BEAT_SECONDS = 0.5
SILENCE_SECONDS = 15.0
GRACE_SECONDS = 8.0
LEFT = "left"
"""In place of the number of a process that has finished its work."""


class Watchdog:
    """The thread of one process that looks after the others.

    Args:
        store: what all processes share.
        rank: number of this process.
        count: number of processes.
        end: ends this process; called if it does not end by itself.
        silence_seconds: how long a number may stand still.
        grace_seconds: how long this process may take to end by itself.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        count: int,
        end: Callable[[int], object] = os._exit,
        silence_seconds: float = SILENCE_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.rank, self.count, self.end = store, rank, count, end
        self.silence_seconds, self.grace_seconds = silence_seconds, grace_seconds
        self.clock = clock
        others = range(1, count) if rank == 0 else [0]
        self.seen = {other: (b"", clock()) for other in others}
        self.fault: Fault | None = None
        self.known = threading.Event()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True, name="secateur-watchdog")

    def start(self) -> None:
        """Begin to count and to look."""
        self.store.set(host(self.rank), socket.gethostname())
        self.store.set(_beat(self.rank), "0")
        self.thread.start()

    def stop(self) -> None:
        """End the thread; the others see that this process has finished."""
        self.over.set()
        self.thread.join()
        if self.fault is None:
            self.quietly(lambda: self.store.set(_beat(self.rank), LEFT))

    # -- faults ----------------------------------------------------------------------------------

    def report(self, error: BaseException) -> Fault:
        """Tell all that this process has failed. Return the first fault, which may be another's."""
        if self.fault is None:
            own = Fault.of(error, self.rank)
            first = self.quietly(lambda: self.store.compare_set("fault", "", own.write()))
            self.hear(Fault.read(first.decode()) if first else own)
        assert self.fault is not None
        return self.fault

    def wait(self, seconds: float) -> Fault | None:
        """Wait for a fault. Return it, or None if there is none by then."""
        self.known.wait(seconds)
        return self.fault

    def acknowledge(self) -> None:
        """Tell the others that this process has heard of the fault."""
        self.quietly(lambda: self.store.set(f"heard/{self.rank}", "yes"))

    def acknowledged(self, ranks: Iterable[int], seconds: float) -> bool:
        """Wait until some processes have heard of the fault. Return whether they have."""
        keys, until = [f"heard/{rank}" for rank in ranks], self.clock() + seconds
        while self.clock() < until:
            if not keys or self.quietly(lambda: self.store.check(keys)):
                return True
            time.sleep(0.1)
        return False

    # -- the thread ------------------------------------------------------------------------------

    def look(self) -> None:
        """Count up, look at the others, and end this process if it does not notice a fault."""
        number, since = 0, self.clock()
        while not self.over.wait(BEAT_SECONDS):
            number += 1
            try:
                self.store.set(_beat(self.rank), str(number))
                if self.store.check(["fault"]):
                    self.hear(Fault.read(self.store.get("fault").decode()))
                self.look_at_others()
            except (RuntimeError, ValueError):  # the machine of the store has gone
                self.hear(Fault(0, "its machine", "the connection to it has closed"))
            if self.fault is None:
                since = self.clock()
            elif self.clock() - since > self.grace_seconds:
                self.force()
                return

    def look_at_others(self) -> None:
        """Report a process whose number stands still."""
        now = self.clock()
        for other, (number, since) in self.seen.items():
            found = self.read(_beat(other))  # nothing yet, if it has died at the start
            if found != number:
                self.seen[other] = found, now
            elif (
                found != LEFT.encode() and now - since > self.silence_seconds and self.fault is None
            ):
                what = f"it was killed, or it hangs (no sign of life for {now - since:.0f} s)"
                place = self.read(host(other)).decode() or "its machine"
                silent = Fault(other, place, what, remedy="run again with --resume")
                first = self.store.compare_set("fault", "", silent.write())
                self.hear(Fault.read(first.decode()))

    def read(self, key: str) -> bytes:
        """A value in the store; empty if there is none. `get` alone would wait for it."""
        return self.store.get(key) if self.store.check([key]) else b""

    def hear(self, fault: Fault) -> None:
        """Remember the first fault."""
        if self.fault is None:
            self.fault = fault
            self.known.set()

    def force(self) -> None:
        """End this process in the middle of whatever it does."""
        assert self.fault is not None
        if self.over.is_set():
            return
        if self.fault.rank != self.rank and 0 in (self.rank, self.fault.rank):
            print(f"error: {self.fault.error()}", file=sys.stderr, flush=True)
        self.end(self.fault.exit_code)

    def quietly(self, work: Callable[[], T]) -> T | None:
        """Do something with the store. Return None if its machine has gone."""
        try:
            return work()
        except (RuntimeError, ValueError):
            return None


def _beat(rank: int) -> str:
    """The key of a process's number in the store."""
    return f"beat/{rank}"


def host(rank: int) -> str:
    """The key of a process's machine in the store."""
    return f"host/{rank}"


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
