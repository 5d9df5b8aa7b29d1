"""A pretended machine and clock, so that two runs of the same code write the same bytes."""

from __future__ import annotations

import builtins
import contextlib
import datetime
import importlib
import io
import os
import random
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["REAL_CLOCK", "in_fork", "pretend"]

TICK_SECONDS = 1 / 64
GIB = 2**30
REAL_CLOCK = time.perf_counter


def is_ours(depth: int = 2) -> bool:
    """Whether a module of secateur has called the caller."""
    return str(sys._getframe(depth).f_globals.get("__name__")).startswith("secateur")


class Clock:
    """A clock that goes forward by the same time whenever secateur reads it."""

    def __init__(self, real: Callable[[], float]) -> None:
        self.real, self.reads = real, 0

    def __call__(self) -> float:
        if not is_ours():
            return self.real()
        self.reads += 1
        return 1_700_000_000.0 + self.reads * TICK_SECONDS


class Today(datetime.date):
    """A calendar that stands still."""

    @classmethod
    def today(cls) -> Today:
        """The same day, always."""
        return cls(2026, 1, 2)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Pydantic reads a date as ever."""
        return handler(cls.__base__)


CLOCKS = [Clock(getattr(time, name)) for name in ("time", "perf_counter", "monotonic")]
FILES = {
    "/proc/cpuinfo": "model name\t: A pretended one\nflags\t\t: fpu sse4_2 avx avx2 fma f16c\n",
    "/proc/self/status": "VmHWM:\t  400000 kB\n",
}


def pretend() -> None:
    """Fix the clock and the machine. Modules that keep the real ones are imported before."""
    for name in ("matplotlib.pyplot", "psutil", "torch", "transformers", "yaml"):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # older code has no such module
        importlib.import_module("secateur.advisor.facts")  # a field of its models is a date
    import psutil

    time.time, time.perf_counter, time.monotonic = CLOCKS
    datetime.date = Today
    open_file, wait = builtins.open, threading.Event.wait

    def opened(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if str(file) in FILES and "r" in mode:
            text = FILES[str(file)]
            return io.BytesIO(text.encode()) if "b" in mode else io.StringIO(text)
        return open_file(file, mode, *more, **options)

    def waited(event: threading.Event, timeout: float | None = None) -> bool:
        """Without a limit, for us: so the thread that prints the progress prints nothing."""
        return wait(event, None if is_ours() else timeout)

    disk = SimpleNamespace(total=100 * GIB, used=40 * GIB, free=60 * GIB)
    memory = psutil.virtual_memory()._replace(total=16 * GIB, available=12 * GIB, free=12 * GIB)
    resident = psutil.Process().memory_info()._replace(rss=GIB // 2)
    for place, name, value in (
        (builtins, "open", opened),
        (io, "open", opened),
        (threading.Event, "wait", waited),
        (psutil, "virtual_memory", lambda: memory),
        (psutil.Process, "memory_info", lambda self: resident),
        (shutil, "disk_usage", lambda path: disk),
        (os, "cpu_count", lambda: 4),
        (os, "sched_getaffinity", lambda process: {0, 1, 2, 3}),
    ):
        setattr(place, name, value)


def in_fork(work: Callable[[], object], out: Path, err: Path) -> int:
    """Do some work in a fork, and write what it prints to two files; returns its exit status."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(out.parent)
        import numpy
        import torch

        for clock in CLOCKS:
            clock.reads = 0
        for set_seed in (random.seed, numpy.random.seed, torch.manual_seed):
            set_seed(0)
        work()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
