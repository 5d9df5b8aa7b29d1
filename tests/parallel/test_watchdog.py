"""Faults reach all processes, and a silent process is found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from secateur.errors import NumericalError
from secateur.parallel.processes import LEFT, SILENCE_SECONDS, START_SECONDS, Fault, Watchdog


@contextmanager
def watchdogs(count: int, **seconds: float) -> Iterator[tuple[list[Watchdog], list[int]]]:
    """The watchdogs of so many processes, all within this one, and the exit codes they give."""
    store, ended = dist.TCPStore("localhost", 0, is_master=True), list[int]()
    made = [Watchdog(store.clone(), rank, count, ended.append, **seconds) for rank in range(count)]
    for watchdog in made:
        watchdog.start()
    try:
        yield made, ended
    finally:
        for watchdog in made:
            watchdog.stop()


def test_the_first_fault_counts_and_all_hear_it() -> None:
    with watchdogs(3) as (made, ended):
        error = NumericalError("3 weights are NaN", where="layers.1", remedy="get it again")
        fault = made[2].report(error)
        assert fault == made[0].wait(10) == made[1].wait(10)
        assert (fault.rank, fault.what, fault.where) == (2, "3 weights are NaN", "layers.1")
        assert made[0].report(ValueError("later")) == fault
        raised = fault.error()
        assert "process 2" in raised.what
        assert "3 weights are NaN" in raised.what
        assert (raised.exit_code, ended) == (1, [])


def test_a_silent_process_is_named_and_one_that_left_is_not() -> None:
    store, now = dist.TCPStore("localhost", 0, is_master=True), [0.0]
    watchdog = Watchdog(store, 0, 3, clock=lambda: now[0], start_seconds=0)
    for rank in (1, 2):
        store.set(f"host/{rank}", f"machine{rank}")
        store.set(f"beat/{rank}", "1 0 ")
    watchdog.look_at_others()
    store.set("beat/1", LEFT)
    now[0] = SILENCE_SECONDS - 1
    watchdog.look_at_others()
    assert watchdog.fault is None
    store.set("beat/2", "2 0 ")
    watchdog.look_at_others()
    now[0] = 2 * SILENCE_SECONDS - 2
    watchdog.look_at_others()
    assert watchdog.fault is None
    now[0] += 2
    watchdog.look_at_others()
    assert watchdog.fault is not None
    assert (watchdog.fault.rank, watchdog.fault.host) == (2, "machine2")
    assert "16 s" in watchdog.fault.what


@pytest.mark.parametrize("closed", [False, True])
def test_a_process_may_be_silent_at_the_start_until_a_connection_closes(closed: bool) -> None:
    store, now = dist.TCPStore("localhost", 0, is_master=True), [0.0]
    watchdog = Watchdog(store, 0, 2, clock=lambda: now[0])
    store.set("host/1", "machine1")
    store.set("beat/1", "1 0 ")
    watchdog.look_at_others()
    now[0] = START_SECONDS - 1
    if closed:
        assert watchdog.wait(0) is None
        now[0] += 0.5
    watchdog.look_at_others()
    assert (watchdog.fault is not None) == closed
    now[0] = START_SECONDS + 1
    watchdog.look_at_others()
    assert watchdog.fault is not None
    assert watchdog.fault.rank == 1


def test_another_call_than_the_others_make_is_named() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True)
    watchdog = Watchdog(store, 0, 2)
    store.set("host/1", "machine1")
    for name in ("once", "gather", "wait"):
        watchdog.enter(name)
    for beat in ("1 1 once", "2 2 gather", "3 9 total of (3, 4)"):  # it may be ahead
        store.set("beat/1", beat)
        watchdog.look_at_others()
        assert watchdog.fault is None
    store.set("beat/1", "4 2 share from 1 of (3, 4)")
    watchdog.look_at_others()
    assert watchdog.fault is not None
    assert (watchdog.fault.rank, watchdog.fault.host) == (1, "machine1")
    for word in ("call 2 ", "`share from 1 of (3, 4)`", "`gather`"):
        assert word in watchdog.fault.what


def test_a_process_that_does_not_end_by_itself_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with watchdogs(2, grace_seconds=0.5) as (made, ended):
        made[1].report(KeyboardInterrupt())
        until = time.monotonic() + 10
        while len(ended) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert ended == [130, 130]
    assert "process 1 " in capsys.readouterr().err


def test_a_fault_survives_the_store() -> None:
    fault = Fault.of(TypeError("no such thing\nsecond line"), 5)
    assert fault.what == "TypeError: no such thing"
    assert Fault.read(fault.write()) == fault
