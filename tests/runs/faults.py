"""Faults between the file operations of a process: which ones there are, and how one is injected.

`shim.c`, loaded before libc, numbers every call that changes files below a folder. The process that
imports this module must have been started with it: `environment` says how. Each try is a fork, so
that torch is imported once for all of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from secateur.errors import SecateurError

KINDS = (
    "create",
    "open",
    "write",
    "truncate",
    "copy",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "link",
)
STREAMED = ("write", "copy")
TAKES_SPACE = ("create", "write", "truncate", "copy", "mkdir", "link")
WATCH, KILL, KILL_TORN, FULL, FULL_TORN = 1, 2, 3, 4, 5
CAPACITY, PATH_BYTES = 60_000, 200
NEVER = -1
SHIM = "SECATEUR_TEST_SHIM"
SECONDS = 300.0
"""After which a try counts as one that never ends."""


def why_not() -> str:
    """Why no fault can be injected here; empty if one can."""
    if sys.platform != "linux":
        return f"calls to the C library are intercepted on Linux only, not on {sys.platform}"
    return "" if shutil.which("gcc") else "there is no gcc to build the shim with"


def build_shim(folder: Path) -> Path:
    """Compile `shim.c` into a folder."""
    library = folder / "shim.so"
    flags = ["-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-U_FORTIFY_SOURCE"]
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["gcc", *flags, "-o", library, source, "-ldl"], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """The environment of a process that can inject faults: one thread, and the shim before libc."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "RAYON")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **threads, **offline, "LD_PRELOAD": str(library), SHIM: str(library)}


@dataclass(frozen=True)
class Operation:
    """One call that changes files.

    Attributes:
        number: in order of the calls.
        kind: one of `KINDS`.
        stage: of the work, counted from 0; it rises whenever the progress starts or ends a stage.
        size: bytes, of a write or a copy.
        path: below the watched folder.
    """

    number: int
    kind: str
    stage: int
    size: int
    path: str


@dataclass(frozen=True)
class Point:
    """Where a fault is injected, and which: killed before a call or in its middle, or a full disk.

    Attributes:
        operation: the call.
        full: whether the disk is full from here on, not the process killed.
        torn: whether the call is half done first.
    """

    operation: Operation
    full: bool
    torn: bool

    @property
    def mode(self) -> int:
        """As `shim.c` knows it."""
        plain, torn = (FULL, FULL_TORN) if self.full else (KILL, KILL_TORN)
        return torn if self.torn else plain

    def __str__(self) -> str:
        what = "disk full" if self.full else "killed"
        when = "in the middle of" if self.torn else "before"
        at = self.operation
        return f"{what} {when} operation {at.number} ({at.kind} {at.path}, stage {at.stage})"


def points_of(operations: Sequence[Operation], *, full: bool) -> list[Point]:
    """A point before every operation, and one in the middle of every file that is written.

    Consecutive writes to one file count as one operation.
    """
    found = []
    for (kind, _), group in groupby(operations, key=lambda x: (x.kind, x.path)):
        calls = list(group)
        if kind not in STREAMED:
            found += [Point(call, full, False) for call in calls]
            continue
        found.append(Point(calls[0], full, False))
        middle = calls[len(calls) // 2]
        if middle.size > 1:
            found.append(Point(middle, full, True))
    return [p for p in found if not full or p.operation.kind in TAKES_SPACE]


class Entry(ctypes.Structure):
    """As in `shim.c`."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("mark", ctypes.c_int),
        ("size", ctypes.c_longlong),
        ("path", ctypes.c_char * PATH_BYTES),
    )


class TensorBoardLog(ctypes.Structure):
    """As in `shim.c`: the operations, in memory that forks share."""

    _fields_ = (("count", ctypes.c_longlong), ("entries", Entry * CAPACITY))


class Steps:
    """A progress that counts in memory that forks share, and tells the shim of every stage."""

    def __init__(self, shim: Shim) -> None:
        self.shim = shim

    def start(self, label: str, steps: int) -> None:
        self.shim.mark.value += 1

    def step(self, count: int = 1, note: str = "") -> None:
        self.shim.steps.value += 1  # one that resumes may report all earlier steps at once

    def finish(self) -> None:
        self.shim.mark.value += 1


@dataclass(frozen=True)
class Ended:
    """How a try ended.

    Attributes:
        how: `done`, `killed`, `refused` (an error of ours), `crashed` (any other) or `hung`.
        message: the error, on one line.
        steps: how often steps were reported.
        operations: that changed files.
    """

    how: str
    message: str
    steps: int
    operations: tuple[Operation, ...]


class Shim:
    """The library that was loaded before libc, and the memory that it shares with forks.

    Args:
        scratch: a folder for what forks have to say; not below a watched one.
    """

    def __init__(self, scratch: Path) -> None:
        self.library = ctypes.CDLL(os.environ[SHIM])
        self.library.faults_arm.argtypes = (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_longlong,
            ctypes.c_longlong,
            ctypes.c_int,
        )
        self.mark = ctypes.c_int.in_dll(self.library, "faults_mark")
        self.shared = mmap.mmap(-1, ctypes.sizeof(TensorBoardLog))
        self.board = TensorBoardLog.from_buffer(self.shared)
        self.shared_steps = mmap.mmap(-1, ctypes.sizeof(ctypes.c_longlong))
        self.steps = ctypes.c_longlong.from_buffer(self.shared_steps)
        self.said, self.log = scratch / "said.txt", scratch / "log.txt"

    def arm(self, folder: Path, number: int, mode: int) -> None:
        """Count from now on, and inject a fault at a number."""
        where = os.fsencode(folder)
        self.library.faults_arm(where, ctypes.addressof(self.board), CAPACITY, number, mode)

    def operations(self) -> Iterator[Operation]:
        """What was entered since the board was cleared."""
        for number in range(min(self.board.count, CAPACITY)):
            entry = self.board.entries[number]
            path = os.fsdecode(entry.path)
            yield Operation(number, KINDS[entry.kind], entry.mark, entry.size, path)

    def attempt(
        self, work: Callable[[Steps], object], watched: Path, point: Point | None = None
    ) -> Ended:
        """Do some work in a fork, with a fault at a point, and see how it ends."""
        self.board.count, self.steps.value, self.mark.value = 0, 0, 0
        self.said.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self.work_in_fork(work, watched, point)
        status = wait_for(child)
        operations = tuple(self.operations())
        if status is None:
            return Ended("hung", f"not done after {SECONDS:.0f} s", self.steps.value, operations)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            how = "killed" if number == signal.SIGKILL else "crashed"
            message = signal.Signals(number).name
            return Ended(how, message, self.steps.value, operations)
        how, _, message = self.said.read_text(encoding="utf-8").partition(" ")
        return Ended(how, message, self.steps.value, operations)

    def work_in_fork(
        self, work: Callable[[Steps], object], watched: Path, point: Point | None
    ) -> None:
        """What the fork does; it does not return."""
        how, message = "done", ""
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            random.seed(os.getpid())  # no result may depend on what a process draws by itself
            torch.manual_seed(os.getpid())
            self.arm(watched, point.operation.number if point else NEVER, mode_of(point))
            work(Steps(self))
        except SecateurError as error:
            how, message = "refused", f"{type(error).__name__}: {error}"
        except BaseException as error:
            how, message = "crashed", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            self.library.faults_disarm()
            self.said.write_text(f"{how} {' '.join(message.split())}", encoding="utf-8")
            os._exit(0)


def mode_of(point: Point | None) -> int:
    """The mode of a point; without one, only watched."""
    return WATCH if point is None else point.mode


def wait_for(child: int) -> int | None:
    """The exit status of a fork; None for one that did not end and was killed for that."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
