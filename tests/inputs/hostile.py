"""Damaged files for every reader: each one must read them or refuse them, and do nothing else.

    python tests/inputs/hostile.py --files 10000 [--seconds 300] [--seed 0] [--reader NAME ...]

A reader gets a copy of a sound folder in which one file is changed: bits, bytes, integers, blocks,
its length, or one thing in its JSON. It runs in a process of its own with 3 GiB of memory. What may
happen:

    read      the values are other ones, but every check passed
    refused   a SecateurError, which says what, where and what to do

What may not: another exception (`raw`), a signal (`crash`), more than 60 s (`slow`), and `outside`:
writing outside the folder and the cache, unpickling, starting a process, or opening a connection.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from inputs.damage import damage
from inputs.hostile_readers import READERS, Reader
from secateur.errors import SecateurError

MEMORY, SECONDS, BATCH = 3 * 2**30, 60.0, 40
GOOD = ("read", "refused")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
BY_FOLDER = ("os.remove", "os.rmdir", "os.mkdir")
NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")


@dataclass(frozen=True)
class Case:
    """One damaged file and what became of it.

    Attributes:
        reader: its name.
        seed: which makes the same damage again.
        outcome: `read`, `refused`, `raw`, `crash`, `slow` or `outside`.
        message: the error, or what was done.
    """

    reader: str
    seed: int
    outcome: str
    message: str


class Watch:
    """Notes what a reader does beyond reading, by Python's audit events.

    Args:
        rooms: folders in which it may write.
    """

    def __init__(self, *rooms: Path) -> None:
        self.rooms, self.seen, self.on = [str(room) for room in rooms], "", False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        """An audit event."""
        if not self.on:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        folder = args[-1] if event in BY_FOLDER else -1
        if event in NEVER or ((writes or event in CHANGES) and not self.inside(args[0], folder)):
            self.seen = self.seen or f"{event} {args[0]!r}"[:200]

    def inside(self, path: object, folder: object = -1) -> bool:
        """Whether a path lies in one of the rooms; a number is a file that is open already.

        /proc/self holds no files: writing there resets the peak of the memory.

        Args:
            path: a path or a number.
            folder: the number of the open folder that the path begins in; -1 for none.
        """
        if isinstance(folder, int) and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))  # type: ignore[arg-type]
        if isinstance(path, int) or path == os.devnull or str(path).startswith("/proc/self/"):
            return True
        real = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        return any(real == room or real.startswith(room + os.sep) for room in self.rooms)


def run_one(reader: Reader, sound: Path, room: Path, seed: int, watch: Watch) -> Case:
    """Damage a copy and read it."""
    draw = random.Random(f"{reader.name} {seed}")
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(sound, room, symlinks=True)
    files = sorted({f for pattern in reader.files for f in room.glob(pattern) if f.is_file()})
    damage(draw.choice(files), draw)
    watch.seen, watch.on = "", True
    outcome, message = "read", ""
    try:
        reader.read(room)
    except SecateurError as error:
        outcome, message = "refused", str(error)[:200]
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/secateur/" in f.filename]
        place = ours[-1] if ours else last
        message = f"{type(error).__name__} {str(error)[:100]!r} in {Path(place.filename).name}:"
        outcome, message = "raw", f"{message}{place.lineno}"
    finally:
        watch.on = False
    if watch.seen:
        outcome, message = "outside", watch.seen
    return Case(reader.name, seed, outcome, message)


def child(reader: Reader, sound: Path, room: Path, seeds: range, pipe: int) -> None:
    """Run some cases, printing the beginning and the end of each."""
    faulthandler.disable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    watch = Watch(room, room.with_name("cache"))
    for seed in seeds:
        os.write(pipe, f"begin {seed}\n".encode())
        case = run_one(reader, sound, room, seed, watch)
        message = case.message.encode("ascii", "backslashreplace").decode().replace("\n", " ")
        os.write(pipe, f"end {seed} {case.outcome} {message}\n".encode()[:4000])


def batch(reader: Reader, sound: Path, room: Path, seeds: range) -> Iterator[Case]:
    """Cases of one process; after a crash or a long wait they end early."""
    inward, outward = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(inward)
        try:
            child(reader, sound, room, seeds, outward)
        finally:
            os._exit(0)
    os.close(outward)
    begun, rest, slow = seeds.start, b"", False
    with os.fdopen(inward, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], SECONDS)[0]:
                os.kill(process, signal.SIGKILL)
                slow = True
                break
            more = pipe.read(65536)
            if not more:
                break
            *lines, rest = (rest + more).split(b"\n")
            for line in lines:
                word, seed, *fields = line.decode().split(" ", 3)
                if word == "begin":
                    begun = int(seed)
                else:
                    yield Case(reader.name, int(seed), fields[0], fields[1] if fields[1:] else "")
    status = os.waitpid(process, 0)[1]
    if slow:
        yield Case(reader.name, begun, "slow", f"{SECONDS:.0f} s")
    elif os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        yield Case(reader.name, begun, "crash", name)


def attack(
    place: Path, files: int, seconds: float = 1e9, first: int = 0, names: tuple[str, ...] = ()
) -> list[Case]:
    """Damage so many files, in turn for all readers.

    Args:
        place: an empty folder for the sound files and their copies.
        files: how many to damage.
        seconds: stop after this time.
        first: the first seed.
        names: of the readers; all without.
    """
    os.environ["SECATEUR_HOME"] = str((place / "cache").resolve())
    (place / "cache").mkdir()
    readers = [reader for reader in READERS if not names or reader.name in names]
    sound = {}
    for reader in readers:
        sound[reader.name] = place / f"sound-{reader.name.replace(' ', '-')}"
        reader.make(sound[reader.name])
        reader.read(Path(shutil.copytree(sound[reader.name], place / "room", dirs_exist_ok=True)))
        shutil.rmtree(place / "room")
    cases, ends, share = list[Case](), time.monotonic() + seconds, -(-files // len(readers))
    at = dict.fromkeys(sound, first)
    while time.monotonic() < ends and any(at[r.name] < first + share for r in readers):
        for reader in readers:
            stop = min(at[reader.name] + BATCH, first + share)
            while at[reader.name] < stop:
                room = place.resolve() / "room"
                seeds = range(at[reader.name], stop)
                for case in batch(reader, sound[reader.name], room, seeds):
                    cases.append(case)
                    at[reader.name] = case.seed + 1
    return cases


def main() -> None:
    """Attack, print the table and the bad cases; exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        cases = attack(place, given.files, given.seconds, given.seed, tuple(given.reader))
    for (reader, outcome), count in sorted(Counter((x.reader, x.outcome) for x in cases).items()):
        print(f"{reader:26} {outcome:10} {count:7}")
    bad = [case for case in cases if case.outcome not in GOOD]
    print(*bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
