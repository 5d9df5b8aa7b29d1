"""The processes that torchrun, a cluster's scheduler or Ray has started for one run.

The launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `joined` reads them. Numbers pass
through torch.distributed: gloo between processors, NCCL between GPUs. Plain data passes as JSON, so
no process unpickles what another one sends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import RankError, RecipeError, SecateurError
from secateur.parallel.launched import Launched
from secateur.parallel.ranks import ALONE, Ranks
from secateur.parallel.watchdog import GRACE_SECONDS, SILENCE_SECONDS, Watchdog

T = TypeVar("T")

JOINING = timedelta(minutes=5)
"""How long the processes wait for each other at the start."""

WORKING = timedelta(days=30)
"""How long one process may work while the others wait. `Watchdog` finds those that do not work."""

HEARING_SECONDS = 6.0
"""How long a process waits for others to hear of its end; shorter than `GRACE_SECONDS`."""

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


class TorchRanks:
    """The processes of a group of torch.distributed. A single one needs no group.

    Args:
        rank: the number of this process.
        count: the number of processes.
        here: the number of processes on this machine.
        device: where plain data is when it passes from one process to another.
    """

    def __init__(self, rank: int, count: int, here: int, device: torch.device) -> None:
        self.rank, self.count, self.here, self.device = rank, count, here, device

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> None:
        """Replace a tensor in place by its sum over all processes; all get the same bits."""
        if self.count > 1:
            with self.together(), _in_one_piece(tensor) as whole:
                dist.all_reduce(whole)

    def share(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor in place by the one of process `owner`, bit for bit."""
        if self.count > 1:
            with self.together(), _in_one_piece(tensor) as whole:
                dist.broadcast(whole.reshape(-1).view(torch.uint8), owner)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        own = self._as_bytes(value)
        size = torch.tensor([len(own)], device=self.device)
        with self.together():
            sizes = [torch.zeros_like(size) for _ in range(self.count)]
            dist.all_gather(sizes, size)
            longest = int(max(sizes))
            texts = [own.new_zeros(longest) for _ in sizes]
            dist.all_gather(texts, torch.cat([own, own.new_zeros(longest - len(own))]))
        return [_as_value(text[: int(n)]) for text, n in zip(texts, sizes, strict=True)]

    def once(self, work: Callable[[], T]) -> T:
        """Do some work in the first process alone, and return its result in all."""
        if self.count == 1:
            return work()
        text = self._as_bytes(work() if self.first else None)
        size = torch.tensor([len(text)], device=self.device)
        self.share(size, 0)
        text = text if self.first else text.new_zeros(int(size))
        self.share(text, 0)
        found: T = _as_value(text)
        return found

    def wait(self) -> None:
        """Wait until all processes reach this call."""
        self.total(torch.zeros(1, device=self.device))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context around an operation in which all processes take part."""
        yield

    def _as_bytes(self, value: object) -> Tensor:
        """Plain data as JSON, one byte in each number, uint8."""
        text = bytearray(json.dumps(value).encode())
        return torch.frombuffer(text, dtype=torch.uint8).to(self.device)

    def __enter__(self) -> TorchRanks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave errors as they are."""


class Processes(TorchRanks):
    """Several processes that find out which of them has failed.

    Args:
        launched: what the launcher has set.
        backend: torch's name of what transports the numbers.

    Raises:
        RankError: not all processes have come.
    """

    def __init__(self, launched: Launched, backend: str) -> None:
        super().__init__(launched.rank, launched.count, launched.here, torch.device("cpu"))
        if not dist.is_initialized():  # Ray has already made the group
            _meet(launched, backend)
        # Kept, because its server may be in this process and must outlive the group.
        self.store = dist.distributed_c10d._get_default_store()
        shared: Any = dist.PrefixStore("secateur", self.store)  # the stubs lack `clone`
        self.watchdog = Watchdog(shared.clone(), self.rank, self.count)

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
        self.before: Any = None
        if _in_main_thread():  # only there a signal can be handled
            self.before = signal.signal(signal.SIGTERM, self.terminated)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        fault = None if error is None else self.watchdog.report(error)
        if dist.is_initialized():
            dist.destroy_process_group()  # a process that waits for this one hears of it now
        try:
            if error is not None and fault is not None:
                self.fail(error, fault.rank, fault.error())
        finally:
            self.watchdog.stop()
            if self.before is not None:
                signal.signal(signal.SIGTERM, self.before)

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
        if not _in_main_thread():  # Ray collects the errors of all
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


@contextmanager
def _in_one_piece(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor whose numbers are consecutive in memory, for an operation in place."""
    whole = tensor.detach().contiguous()
    yield whole
    if whole.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(whole)


def _as_value(text: Tensor) -> Any:
    """The plain data of some bytes."""
    return json.loads(text.cpu().numpy().tobytes())


def _in_main_thread() -> bool:
    """Whether the work runs in the main thread. Ray runs it in another one."""
    return threading.current_thread() is threading.main_thread()
