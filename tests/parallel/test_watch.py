"""Faults reach all processes, and a silent process is found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from secateur.errors import NumericalError
from secateur.parallel.faults import Fault
from secateur.parallel.watch import Watch


@contextmanager
def watches(count: int, **seconds: float) -> Iterator[tuple[list[Watch], list[int]]]:
    """The watches of so many processes, all within this one, and the exit codes they would give."""
    store, ended = dist.TCPStore("localhost", 0, is_master=True), list[int]()
    made = [Watch(store.clone(), rank, count, ended.append, **seconds) for rank in range(count)]
    for watch in made:
        watch.start()
    try:
        yield made, ended
    finally:
        for watch in made:
            watch.stop()


def test_the_first_fault_counts_and_all_hear_it() -> None:
    with watches(3) as (made, ended):
        error = NumericalError("3 weights are NaN", where="layers.1", remedy="get it again")
        fault = made[2].report(error)
        assert fault == made[0].wait(10) == made[1].wait(10)
        assert (fault.rank, fault.what, fault.where) == (2, "3 weights are NaN", "layers.1")
        assert made[0].report(ValueError("later")) == fault
        told = fault.error()
        assert "process 2" in told.what and "3 weights are NaN" in told.what
        assert told.exit_code == 1 and not ended


def test_a_silent_process_is_named_and_one_that_left_is_not() -> None:
    with watches(3, silence_seconds=1.5, grace_seconds=60) as (made, _):
        made[1].stop()  # it has finished its work
        assert made[0].wait(3) is None
        made[2].over.set()  # it says nothing any more, as if it had been killed
        fault = made[0].wait(10)
        assert fault is not None and fault.rank == 2
        assert "no sign of life" in fault.what


def test_a_process_that_does_not_end_by_itself_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with watches(2, grace_seconds=0.5) as (made, ended):
        made[1].report(KeyboardInterrupt())
        until = time.monotonic() + 10
        while len(ended) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert ended == [130, 130]
    assert "process 1 of the run" in capsys.readouterr().err


def test_a_fault_survives_the_store() -> None:
    fault = Fault.of(TypeError("no such thing\nsecond line"), 5)
    assert fault.what == "TypeError: no such thing"
    assert Fault.read(fault.write()) == fault
