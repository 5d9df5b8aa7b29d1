"""The processes that torchrun or a cluster's scheduler has started for one run.

The launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `joined` reads them.

`Watchdog` notices that a process has failed, has died or hangs, and tells all the others.
Processes that wait for each other cannot hear of an error: the sum that they wait for never comes.
So every process has a thread that counts up a number of its own in the store that all share. The
first process looks at the numbers of all others, and they look at its number. A number that stands
still for `SILENCE_SECONDS` is a fault, but not in the first `START_SECONDS` while all connections
stand: a library that loads from a slow disk may stop all threads of a process. An error that a
process reports itself is a fault. So is another call than the others make: beside the number stands
the last call that all processes must make, with its number. The first fault counts, and all read
it.

A process that hears of a fault has `GRACE_SECONDS` to end by itself: the sum that it waits for
fails when the connection to the failed process closes. Otherwise the thread ends it. A run may be
killed at any moment, so nothing is lost.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import RankError, RecipeError, SecateurError
from secateur.parallel.launched import Launched
from secateur.parallel.ranks import ALONE, REPORT, Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

JOINING = timedelta(minutes=5)
"""How long the processes wait for each other at the start."""

WORKING = timedelta(days=30)
"""How long one process may work while the others wait. `Watchdog` finds those that do not work."""

HEARING_SECONDS = 6.0
"""How long a process waits for others to hear of its end; shorter than `GRACE_SECONDS`."""

TRANSPORT = re.compile("gloo|NCCL")
"""What the errors of a closed connection name."""

PRINTING_SECONDS = 1.0
"""How long the first process may take to print an error before its launcher kills it."""


def joined(device: str = "auto") -> Ranks:
    """The processes that were launched together with this one; `ALONE` if there are no others.

    Args:
        device: the device of the recipe. On GPUs, each process of a machine takes its own.

    Raises:
        RecipeError: the launcher's variables are wrong, or a machine has too few GPUs.
        RankError: not all processes have come.
    """
    launched = Launched.read(os.environ)
    if launched.count == 1:
        return ALONE
    on_gpu = device.startswith(("auto", "cuda")) and torch.cuda.is_available()
    if on_gpu:
        _take_gpu(launched, torch.cuda.device_count(), device)
    return Processes(launched, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")


def _take_gpu(launched: Launched, gpus: int, device: str) -> None:
    """Give this process a GPU of its own."""
    if ":" in device:
        raise RecipeError(
            f"{launched.here} processes of this machine would all use {device}",
            remedy="use --device cuda: each process takes its own GPU",
        )
    if launched.here > gpus:
        raise RecipeError(
            f"this machine has {gpus} GPUs for {launched.here} processes",
            remedy=f"start at most {gpus} processes on it, or use --device cpu",
        )
    torch.cuda.set_device(launched.place)


class Processes(Ranks):
    """Several processes that find out which of them has failed.

    Args:
        launched: what the launcher has set.
        backend: torch's name of what transports the numbers.

    Raises:
        RankError: not all processes have come.
    """

    def __init__(self, launched: Launched, backend: str) -> None:
        super().__init__(launched.rank, launched.count, launched.here, launched.place)
        _meet(launched, backend)
        # Kept, because its server may be in this process and must outlive the group.
        self.store = dist.distributed_c10d._get_default_store()
        shared: Any = dist.PrefixStore("secateur", self.store)  # the stubs lack `clone`
        self.watchdog = Watchdog(shared.clone(), self.rank, self.count)

    def enter(self, name: str, tensor: Tensor | None = None) -> None:
        """Begin a call that all processes make; the watchdog compares it with theirs."""
        super().enter(name, tensor)
        self.watchdog.enter(name if tensor is None else f"{name} of {tuple(tensor.shape)}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context in which a closed connection is the error of the process that has failed.

        Raises:
            RankError: naming that process.
        """
        try:
            yield
        except RuntimeError as error:  # torch's errors of gloo and NCCL
            fault = self.watchdog.wait(SILENCE_SECONDS + GRACE_SECONDS)
            if fault is None:
                raise RankError(
                    f"process {self.rank} has lost the others: {str(error).splitlines()[0]}",
                    remedy="run again with --resume",
                ) from error
            raise fault.error() from error

    # -- the life of the run ---------------------------------------------------------------------

    def __enter__(self) -> Processes:
        self.watchdog.start()
        self.wait()  # every process has a number before another one looks at it
        self.before = signal.signal(signal.SIGTERM, self.terminated)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lost: RankError | None = None
        if isinstance(error, RuntimeError) and TRANSPORT.search(str(error)):
            try:  # a sum of FSDP's, outside `together`
                with self.together():
                    raise error
            except RankError as found:
                error = lost = found
        fault = None if error is None else self.watchdog.report(error)
        if dist.is_initialized():
            dist.destroy_process_group()  # a process that waits for this one hears of it now
        try:
            if error is not None and fault is not None:
                self.fail(error, fault.rank, fault.error())
        finally:
            self.watchdog.stop()
            signal.signal(signal.SIGTERM, self.before)
        if lost is not None:
            raise lost

    def fail(self, error: BaseException, rank: int, reason: RankError) -> None:
        """End with the error of the process that failed first. Only the first process prints it.

        Raises:
            RankError: another process has failed.
            SystemExit: the first process prints the reason, so this one ends without a word.
        """
        self.watchdog.acknowledge()
        if self.first:  # it may have the store, so it leaves last
            others = [other for other in range(1, self.count) if other != rank]
            self.watchdog.acknowledged(others, HEARING_SECONDS)
            if rank != 0:
                raise reason from error
            return
        if self.watchdog.acknowledged([0], HEARING_SECONDS):
            time.sleep(PRINTING_SECONDS)
            if isinstance(error, (SecateurError, KeyboardInterrupt)):
                sys.exit(reason.exit_code)

    def terminated(self, number: int, frame: FrameType | None) -> None:
        """End because the launcher says so, usually because another process has failed.

        Raises:
            RankError: with the reason, as far as it is known.
        """
        fault = self.watchdog.wait(SILENCE_SECONDS + 2)
        if fault is not None:
            raise fault.error()
        raise RankError(
            f"process {self.rank} was terminated by the system or its launcher",
            remedy="run again with --resume",
        )


def _meet(launched: Launched, backend: str) -> None:
    """Connect this process with all others."""
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=JOINING))
        store.set(f"here/{rank}", "yes")
        store.wait([f"here/{other}" for other in range(count)], JOINING)
    except (RuntimeError, ValueError, OSError) as error:  # torch's errors are RuntimeErrors
        raise RankError(
            f"process {launched.rank} waited {JOINING.seconds} s for {launched.count - 1} others: "
            f"{str(error).splitlines()[0]}",
            where=f"MASTER_ADDR={launched.address}, MASTER_PORT={launched.port}",
            remedy="start all processes at once, and check that they reach this address",
        ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=WORKING)


BEAT_SECONDS = 0.5
SILENCE_SECONDS = 15.0
START_SECONDS = 120.0
"""How long libraries and GPUs may take to start."""
GRACE_SECONDS = 8.0
LEFT = "left"
"""In place of the number of a process that has finished its work."""
CALLS = 1000
"""How many of its last calls a process remembers. It may be some ahead of the others."""


class Watchdog:
    """The thread of one process that looks after the others.

    Args:
        store: what all processes share.
        rank: number of this process.
        count: number of processes.
        end: ends this process; called if it does not end by itself.
        silence_seconds: how long a number may stand still.
        start_seconds: how long it may do so at the start.
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
        start_seconds: float = START_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.rank, self.count, self.end = store, rank, count, end
        self.silence_seconds, self.grace_seconds = silence_seconds, grace_seconds
        self.clock, self.started = clock, clock() + start_seconds
        others = range(1, count) if rank == 0 else [0]
        self.seen = {other: (b"", clock()) for other in others}
        self.calls, self.last = {0: ""}, 0  # the last calls by their numbers
        self.fault: Fault | None = None
        self.known = threading.Event()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True, name="secateur-watchdog")

    def start(self) -> None:
        """Begin to count and to look."""
        self.store.set(host(self.rank), socket.gethostname())
        self.beat(0)
        self.thread.start()

    def stop(self) -> None:
        """End the thread; the others see that this process has finished."""
        self.over.set()
        self.thread.join()
        if self.fault is None:
            self.quietly(lambda: self.store.set(_beat(self.rank), LEFT))

    def enter(self, name: str) -> None:
        """Begin the next call that all processes make."""
        number = self.last + 1
        self.calls[number] = name
        self.calls.pop(number - CALLS, None)
        self.last = number  # only now, because the thread reads both

    def beat(self, number: int) -> None:
        """Show the others a number, and the last call."""
        last = self.last
        self.store.set(_beat(self.rank), f"{number} {last} {self.calls[last]}")

    # -- faults ----------------------------------------------------------------------------------

    def report(self, error: BaseException) -> Fault:
        """Tell all that this process has failed. Return the first fault, which may be another's."""
        if self.fault is not None:
            return self.fault
        own = Fault.of(error, self.rank)
        first = self.quietly(lambda: self.store.compare_set("fault", "", own.write()))
        return self.hear(Fault.read(first.decode()) if first else own)

    def wait(self, seconds: float) -> Fault | None:
        """Wait for a fault. Return it, or None if there is none by then.

        A connection has closed, so silence is a fault now, at the start too.
        """
        self.started = self.clock()
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
                self.beat(number)
                if self.store.check(["fault"]):
                    self.hear(Fault.read(self.store.get("fault").decode()))
                self.look_at_others()
            except (RuntimeError, ValueError):  # the machine of the store has gone
                self.hear(Fault(0, "its machine", "the connection to it has closed"))
            if self.fault is None:
                since = self.clock()
            elif self.clock() - since > self.grace_seconds:
                self.force(self.fault)
                return

    def look_at_others(self) -> None:
        """Report a process whose number stands still, or that has made another call."""
        now = self.clock()
        for other, (number, since) in self.seen.items():
            found = self.read(_beat(other))  # nothing yet, if it has died at the start
            if found == LEFT.encode():
                continue
            if found != number:
                self.seen[other] = found, now
                self.compare(other, found.decode())
            elif now - since > self.silence_seconds and now > self.started:
                what = f"it was killed, or it hangs (no sign of life for {now - since:.0f} s)"
                self.accuse(other, what, "run again with --resume")

    def compare(self, other: int, beat: str) -> None:
        """Report a process whose last call is not the one that this process has made."""
        _, number, name = beat.split(" ", 2)
        own = self.calls.get(int(number), name)
        if own != name:
            what = f"call {number} of all processes was `{name}` there, `{own}` in {self.rank}"
            self.accuse(other, what, REPORT)

    def accuse(self, other: int, what: str, remedy: str) -> None:
        """Report the fault of another process, unless there is one already."""
        if self.fault is None:
            place = self.read(host(other)).decode() or "its machine"
            fault = Fault(other, place, what, remedy=remedy)
            self.hear(Fault.read(self.store.compare_set("fault", "", fault.write()).decode()))

    def read(self, key: str) -> bytes:
        """A value in the store; empty if there is none. `get` alone would wait for it."""
        return self.store.get(key) if self.store.check([key]) else b""

    def hear(self, fault: Fault) -> Fault:
        """Remember the first fault, and return it."""
        if self.fault is None:
            self.fault = fault
            self.known.set()
        return self.fault

    def force(self, fault: Fault) -> None:
        """End this process in the middle of whatever it does."""
        if self.over.is_set():
            return
        if fault.rank != self.rank and 0 in (self.rank, fault.rank):
            print(f"error: {fault.error()}", file=sys.stderr, flush=True)
        self.end(fault.exit_code)

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
