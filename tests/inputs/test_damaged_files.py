"""Damaged files of every kind are read or refused: no crash, no raw error, nothing outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import save_tiny

from inputs.hostile import GOOD, Case, Watch, attack, batch
from inputs.hostile_readers import READERS, Reader

SECONDS = float(os.environ.get("SECATEUR_FUZZ_SECONDS", "60"))


def writes_outside(room: Path) -> None:
    (room.parent / "beside").write_text("x")


def ends_the_process(room: Path) -> None:
    os.kill(os.getpid(), 11)


def takes_memory(room: Path) -> None:
    bytearray(2**40)


def made(read) -> Reader:
    return Reader("planted", lambda p: save_tiny(p, num_hidden_layers=1), ("config.json",), read)


@pytest.mark.parametrize(
    ("read", "outcome", "message"),
    [
        (writes_outside, "outside", "open"),
        (ends_the_process, "crash", "SIGSEGV"),
        (takes_memory, "raw", "MemoryError"),
    ],
)
def test_planted_faults_are_found(read, outcome: str, message: str, tmp_path: Path) -> None:
    reader = made(read)
    reader.make(tmp_path / "sound")
    (case,) = batch(reader, tmp_path / "sound", tmp_path / "room", range(1))
    assert (case.outcome, case.reader) == (outcome, "planted")
    assert message in case.message


def test_a_watch_knows_its_rooms(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "room")
    assert watch.inside(str(tmp_path / "room" / "x"))
    assert not watch.inside(str(tmp_path / "room-2"))
    assert not watch.inside(str(tmp_path / "room" / ".." / "x"))


def assert_good(cases: list[Case]) -> None:
    assert not [case for case in cases if case.outcome not in GOOD]
    refused = {case.reader for case in cases if case.outcome == "refused"}
    assert refused == {reader.name for reader in READERS}


@pytest.mark.parametrize(
    ("name", "seed"), [("tokenizer", 10025), ("tokenizer", 10173), ("compressed-tensors", 10160)]
)
def test_what_was_found_once_is_refused(name: str, seed: int, tmp_path: Path) -> None:
    [case] = attack(tmp_path, 1, first=seed, names=(name,))
    assert (case.reader, case.outcome) == (name, "refused")


def test_some_damaged_files_of_every_kind(tmp_path: Path) -> None:
    assert_good(attack(tmp_path, 12 * len(READERS), first=1000))


@pytest.mark.slow
def test_damaged_files_for_a_minute(tmp_path: Path) -> None:
    assert_good(attack(tmp_path, 10_000, SECONDS, first=10_000))
