"""The processes of a run: one alone, or several that calculate together and share the work.

Every process runs the same code. Rank 0 is the first process: it alone writes files, and it tells
the others what only it knows (`once`). A single process is `ALONE`, which has nobody to wait for.
Numbers pass through torch.distributed: gloo between processors, NCCL between GPUs. Plain data
passes as JSON, so no process unpickles what another one sends.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from types import TracebackType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import RankError, RecipeError

T = TypeVar("T")

REPORT = "this is a fault in secateur or in a plug-in; please report it"
"""What a user can do about calls that do not fit together."""


class Ranks:
    """The processes of a run, as a context manager around their work. A single one needs no group.

    All processes make the same calls in the same order. An error that leaves the context ends the
    run in every process. The work of `once` makes no calls: the other processes would not make
    them. A call there raises an error, with a single process too.

    Args:
        rank: the number of this process, from 0.
        count: the number of processes.
        here: the number of processes on this machine, which share its memory.
        place: the number of this process on its machine.
        plain: the group for plain data, with gloo: who waits for a sum in gloo waits in the
            program, while NCCL only lets the GPU wait. None if the group of all has gloo.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        here: int = 1,
        place: int = 0,
        plain: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.count, self.here, self.place = rank, count, here, place
        self.plain = plain
        self.in_once = set[int]()  # the threads that do the work of a `once`

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> None:
        """Replace a tensor in place by its sum over all processes; all get the same bits."""
        self.enter("total", tensor)
        if self.count > 1:
            with self.together(), _in_one_piece(tensor) as whole:
                dist.all_reduce(whole)

    def share(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor in place by the one of process `owner`, bit for bit."""
        self.enter(f"share from {owner}", tensor)
        if self.count > 1:
            with self.together(), _in_one_piece(tensor) as whole:
                # as bytes: a transport may not know bfloat16, and NaNs keep their bits
                dist.broadcast(whole.reshape(-1).view(torch.uint8), owner)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. A value is plain data, as JSON has it."""
        self.enter("gather")
        if self.count == 1:
            return [value]
        own = _as_bytes(value)  # uint8[bytes]
        size = torch.tensor([len(own)])
        with self.together():
            sizes = [torch.zeros_like(size) for _ in range(self.count)]
            dist.all_gather(sizes, size, self.plain)
            longest = int(max(sizes))
            # `all_gather` takes equal shapes only: the shorter texts end in zeros
            texts = [own.new_zeros(longest) for _ in sizes]
            dist.all_gather(texts, torch.cat([own, own.new_zeros(longest - len(own))]), self.plain)
        return [_as_value(text[: int(n)]) for text, n in zip(texts, sizes, strict=True)]

    def once(self, work: Callable[[], T]) -> T:
        """Do some work in the first process alone, and return its result in all.

        The result is plain data, as JSON has it. The others wait.
        """
        self.enter("once")
        self.in_once.add(get_ident())
        try:
            done = work() if self.first else None
        finally:
            self.in_once.discard(get_ident())
        if self.count == 1:
            return cast("T", done)
        text = _as_bytes(done)
        size = torch.tensor([len(text)])
        with self.together():
            dist.broadcast(size, 0, self.plain)
            text = text if self.first else text.new_zeros(int(size))
            dist.broadcast(text, 0, self.plain)
        return cast("T", _as_value(text))

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do some work in the first process, then in the others, which find what that one made."""
        done = [work()] if self.first else []
        self.wait()
        return done[0] if done else work()

    def wait(self) -> None:
        """Wait until all processes reach this call."""
        self.enter("wait")
        if self.count > 1:
            with self.together():
                dist.all_reduce(torch.zeros(1), group=self.plain)

    def enter(self, name: str, tensor: Tensor | None = None) -> None:
        """Begin a call that all processes make.

        Args:
            name: of the call.
            tensor: what the call changes in place.

        Raises:
            RankError: it is part of the work of a `once`, which the others do not do.
        """
        if get_ident() in self.in_once:
            raise RankError(
                f"`{name}` was called in the work of a `once`, which only one process does",
                remedy=REPORT,
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context around an operation in which all processes take part."""
        yield

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave errors as they are."""


ALONE = Ranks()
"""The only process of a run."""


@contextmanager
def _in_one_piece(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor whose numbers are consecutive in memory, for an operation in place."""
    whole = tensor.detach().contiguous()
    yield whole
    if whole.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(whole)


def _as_bytes(value: object) -> Tensor:
    """Plain data as JSON, one byte in each number, uint8."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _as_value(text: Tensor) -> Any:
    """The plain data of some bytes."""
    return json.loads(text.numpy().tobytes())


def micro_batches(windows: int, largest: int, ranks: int = 1) -> list[slice]:
    """Cut calibration windows into the micro-batches of a single process, for any number of them.

    So the forwards round in the same way. With fewer micro-batches than processes some processes
    have no windows; they still solve linears.

    Args:
        windows: number of windows.
        largest: most windows in a micro-batch.
        ranks: number of processes, to refuse too many.

    Returns:
        Ranges of windows.

    Raises:
        RecipeError: there are fewer windows than processes.

    Example:
        >>> from secateur.parallel.ranks import micro_batches
        >>> micro_batches(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if windows < ranks:
        raise RecipeError(
            f"{ranks} processes have only {windows} calibration windows",
            remedy=f"use at most {windows} processes, or more --windows",
        )
    return [slice(i, min(i + largest, windows)) for i in range(0, windows, largest)]


def rows_of(rank: int, batches: Sequence[slice], ranks: int) -> list[slice]:
    """The micro-batches of one process: consecutive ones, so its windows are one range.

    If there are fewer than processes, the last processes have none.

    Args:
        rank: number of the process.
        batches: all micro-batches, from `micro_batches`.
        ranks: number of processes.

    Example:
        >>> from secateur.parallel.ranks import micro_batches, rows_of
        >>> [rows_of(rank, micro_batches(5, 2), 4) for rank in (0, 3)]
        [[slice(0, 2, None)], []]
    """
    each, more = divmod(len(batches), ranks)
    first, end = (each * number + min(number, more) for number in (rank, rank + 1))
    return list(batches[first:end])


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Assign pieces of work to processes, so that the busiest one has little more than the others.

    The most expensive piece goes first, each to the process with the least work so far. The busiest
    process has at most 4/3 of the best possible maximum (Graham 1969).

    Args:
        costs: cost of each piece, in any unit.
        ranks: number of processes.

    Returns:
        The process of each piece; every process computes the same list.

    Example:
        >>> from secateur.parallel.ranks import owners
        >>> owners([4, 1, 1, 2], 2)
        [0, 1, 1, 1]
    """
    busy, found = [0.0] * ranks, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):  # ties by place
        found[piece] = min(range(ranks), key=lambda rank: (busy[rank], rank))
        busy[found[piece]] += costs[piece]
    return found


def refuse_another_model(rank: int, folder: Path) -> NoReturn:
    """Refuse a process that reads another model than the first one.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(
        f"process {rank} on {socket.gethostname()} reads another model than the first process: "
        "names, shapes or dtypes of the tensors differ",
        where=str(folder),
        remedy="give all machines the same files",
    )


def refuse_another_disk(rank: int, place: Path) -> NoReturn:
    """Refuse a process that does not see a file or folder of the run.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(
        f"process {rank} on {socket.gethostname()} does not see the folder of the run",
        where=str(place),
        remedy="put --output on a file system that all machines share",
    )
