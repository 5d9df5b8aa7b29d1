"""The folder of a run, from the first check to the final name of its result.

    OUTPUT.partial/run.json   which run this is, which process works on it, and its progress
    OUTPUT.partial/work/      the files that a resumed run reads
    OUTPUT.partial/model/     the result; one rename makes it OUTPUT
    OUTPUT/secateur/run.json  which run made it, so that --resume of a finished run is recognised

Every verb that writes a folder uses it. Files that a resumed run reads stay until the rename. An
old output stays until the new one has its name. A lock keeps two runs from one folder. Files that
no run has made are never removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from secateur.errors import MemoryBudgetError, RecipeError, SecateurError
from secateur.progress import Progress, Silent
from secateur.runs import output as files
from secateur.runs.lock import Lock

NOTES = "secateur"
"""The folder within a model's folder with recipe, manifest and records of its runs."""

STATE = "run.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """The content of `run.json`.

    Attributes:
        verb: the command that works here.
        identity: everything that the result depends on; None while there is nothing to resume.
        finished: device and inode of the result, stored before it gets its name.
        process: id of the process that works here, or worked here last.
        host: the machine of that process.
        since: its start, in local time.
    """

    verb: str
    identity: dict[str, Any] | None = None
    finished: tuple[int, int] | None = None
    process: int = 0
    host: str = ""
    since: str = ""

    def held(self) -> State:
        """The same state, with this process as the one that works here."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return replace(self, process=os.getpid(), host=socket.gethostname(), since=since)


class RunFolder:
    """The folder of one run, as a context manager around the work.

    The constructor only reads. Entering creates `OUTPUT.partial` and locks it. After an error,
    leaving keeps a run that can be resumed, and removes any other.

    Args:
        output: the folder of the result.
        verb: the name of the command on the command line.
        resume: continue a stopped run; start, if there is none.
        restart: discard a stopped run.
        overwrite: replace an existing model.

    Raises:
        RecipeError: `output` is missing or taken, or a stopped run exists there.
    """

    def __init__(
        self,
        output: str | Path | None,
        verb: str,
        *,
        resume: bool = False,
        restart: bool = False,
        overwrite: bool = False,
    ) -> None:
        if output is None or not str(output):
            raise RecipeError("no output folder", remedy="add --output DIR")
        # a folder whose code may run stays one
        place = type(output) if isinstance(output, Path) else Path
        self.output = place(os.path.abspath(output))
        files.check_writable(self.output)
        self.verb, self.overwrite, self.restart = verb, overwrite, restart
        self.wants_resume = resume
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.worth_resuming: Callable[[], bool] = self.has_results
        self.whole = self.finished = self.resumed = False
        self.identity: dict[str, Any] | None = None
        self.lock = Lock(self.partial)
        self.state = self.check_state()

    # -- places ----------------------------------------------------------------------------------

    @property
    def work(self) -> Path:
        """The folder that a resumed run reads; it is removed after the result has its name."""
        return self.partial / "work"

    @property
    def model(self) -> Path:
        """The result: in the partial folder, and under its final name when it is finished."""
        return self.output if self.finished else self.partial / "model"

    @property
    def made(self) -> Path:
        """What becomes the output."""
        return self.model

    @property
    def notes(self) -> Path:
        """Recipe, manifest and records, within the result."""
        return self.model / NOTES

    @property
    def old_output(self) -> Path:
        """The name of an old output for a moment, while it is replaced."""
        return self.partial / "replaced"

    # -- checks ----------------------------------------------------------------------------------

    def check_state(self) -> State | None:
        """Read the state of the folder, and refuse an impossible call; writes nothing.

        Returns:
            The state of the stopped run to resume; None to start.
        """
        try:
            stopped = self.stopped()
            if self.lock.is_taken:
                raise self.in_use(stopped)
            # without an identity nothing was done that could be resumed
            begun = stopped if stopped is not None and stopped.identity is not None else None
            result = self.result(begun) if self.wants_resume and not self.restart else None
            self.finished = result is not None
            if begun is not None and not self.restart and not self.has_name(begun):
                self.check_stopped(begun)
            if not self.finished and not self.old_output.exists():
                self.check_free_name(begun)
        except OSError as error:
            raise files.cannot_write(error, self.output) from error
        return result or (begun if self.wants_resume and not self.restart else None)

    def result(self, begun: State | None) -> State | None:
        """The run that made the output, if this call asks for that run; else None.

        Args:
            begun: the run in the partial folder.
        """
        named = self.has_name(begun)
        if (begun is not None and not named) or (self.overwrite and not named):
            return None
        try:
            made, found = State(**self.stored()), self.output.stat()
        except (OSError, ValueError, TypeError, KeyError, SecateurError):
            return begun
        if made.verb != self.verb:
            return None
        return replace(made, finished=(found.st_dev, found.st_ino))

    def stored(self) -> dict[str, Any]:
        """Verb and identity of the run that made the output, as its notes have them.

        Raises:
            OSError, ValueError, TypeError, KeyError, SecateurError: it says nothing.
        """
        content: dict[str, Any] = json.loads((self.output / NOTES / STATE).read_bytes())
        return content

    def check_free_name(self, stopped: State | None = None, result: Path | None = None) -> None:
        """Refuse an output that exists, unless it is a model and may be replaced.

        Args:
            stopped: the run that this call continues, if it does.
            result: the finished result, if the work is done.
        """
        files.check_replaceable(self.output, self.overwrite, result)

    def check_stopped(self, stopped: State) -> None:
        """Refuse a stopped run that this call does not continue."""
        if stopped.verb != self.verb:
            raise RecipeError(
                f"a stopped `secateur {stopped.verb}` occupies the work folder of this run",
                where=str(self.partial),
                remedy="finish it with --resume, discard it with --restart, or choose another "
                "--output",
            )
        if not self.wants_resume:
            raise RecipeError(
                "an earlier run to this folder was stopped before it finished",
                where=str(self.partial),
                remedy="add --resume to continue it, or --restart to discard it",
            )

    def stopped(self) -> State | None:
        """The state that an earlier run wrote into the partial folder.

        Raises:
            RecipeError: the folder exists, and no run has made it.
        """
        if not os.path.lexists(self.partial):
            return None
        try:
            stored = json.loads((self.partial / STATE).read_text(encoding="utf-8"))
            finished = stored.pop("finished", None)
            return State(**stored, finished=tuple(finished) if finished else None)
        except FileNotFoundError:  # a run is starting, or is being discarded
            left = {entry.name for entry in self.partial.iterdir()}
            if not left or self.empty_mark.name in left:
                return None
        except (OSError, ValueError, TypeError):
            pass
        raise RecipeError(
            "a folder of this name is in the way, and no run of secateur has made it",
            where=str(self.partial),
            remedy="move it away, or choose another --output",
        )

    def has_name(self, stopped: State | None) -> bool:
        """Whether the result of a run already has its name."""
        if stopped is None or stopped.finished is None or not self.output.exists():
            return False
        found = self.output.stat()
        return stopped.finished == (found.st_dev, found.st_ino)

    def in_use(self, state: State | None) -> RecipeError:
        """The error that another process works on the folder; names it if it is known."""
        name = "another process"
        if state is not None:
            name = f"process {state.process} on {state.host} (secateur {state.verb}, since "
            name += f"{state.since})"
        return RecipeError(
            f"{name} is working on this output",
            where=str(self.partial),
            remedy="wait until it ends, or choose another --output",
        )

    def keep_apart(self, *read: str | Path | None) -> None:
        """Refuse an output that would replace files that the run reads, or is inside them.

        Args:
            *read: files and folders that the run reads; names that are no path are ignored.

        Raises:
            RecipeError: names both.
        """
        for path in read:
            if path is not None:
                files.check_apart(path, self.output, self.partial)

    # -- the life of a run -----------------------------------------------------------------------

    def __enter__(self) -> RunFolder:
        try:
            if not self.lock.take():
                raise self.in_use(self.stopped())
            self.restore_old_output()
            # again, now that nobody else can change the folder
            self.state = self.check_state()
            self.resumed = self.state is not None
            if self.state is None:
                self.remove_contents()
            self.write_state((self.state or State(self.verb)).held())
            if not self.finished:
                self.work.mkdir(exist_ok=True)
                self.notes.mkdir(parents=True, exist_ok=True)
        except BaseException as error:
            if self.lock.descriptor is not None:
                with contextlib.suppress(OSError):  # it holds a stopped run
                    self.partial.rmdir()
            self.lock.release()
            if isinstance(error, OSError):
                raise files.cannot_write(error, self.output) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        waste = self.finished or (error is not None and self.is_waste(error))
        full = None
        if error is not None and files.is_full(error):
            where = error.where if isinstance(error, SecateurError) else None
            full = files.cannot_write(error, Path(where or self.partial), kept=not waste)
        try:
            if waste:
                self.remove()
        except PermissionError as kept:  # Windows does not delete what a program has open
            if not self.finished:
                raise
            log.warning("%s is finished; delete %s: %s", self.output, self.partial, kept)
        finally:
            self.lock.release()
        if full is not None:
            raise full from error

    def begin(self, identity: Mapping[str, Any], settled: Mapping[str, Any] | None = None) -> None:
        """Store what the result depends on; from now on, the run can be resumed.

        Args:
            identity: what must not change while the run is stopped; empty if nothing can be
                resumed.
            settled: what else the result depends on; it must not change once the run is finished.

        Raises:
            RecipeError: the stopped or finished run had another identity.
        """
        assert self.state is not None
        self.identity = {**identity, **(settled or {})}
        if self.finished and self.state.identity is not None:
            refuse_another(self.state.identity, self.identity, self.output, finished=True)
            log.warning("%s: finished already", self.output)
        elif self.state.identity is not None:
            refuse_another(self.state.identity, identity, self.partial)
        elif identity:
            self.write_state(replace(self.state, identity=json.loads(json.dumps(identity))))

    def fresh_model(self) -> Path:
        """Create the folder of the result, empty."""
        shutil.rmtree(self.model, ignore_errors=True)
        self.notes.mkdir(parents=True)
        return self.model

    def finish(self) -> None:
        """Give the result its name, then remove everything else.

        Raises:
            RecipeError: an output has appeared during the run; the result stays in the partial
                folder.
        """
        assert self.state is not None
        self.whole = True
        self.check_free_name(self.state, result=self.model)
        if self.identity is not None:
            files.write_json(self.notes / STATE, {"verb": self.verb, "identity": self.identity})
        self.note_finished(self.made)
        try:
            self.take_name()
        except FileExistsError:
            self.check_free_name(result=self.model)
            raise
        self.finished = True

    def take_name(self) -> None:
        """Rename the result.

        Raises:
            FileExistsError: an output has appeared.
        """
        files.take_name(self.model, self.output, self.old_output)

    def note_finished(self, made: Path) -> None:
        """Store which file or folder gets the name of the output.

        Before the rename: it keeps the inode, so the next call sees whether it happened.
        """
        assert self.state is not None
        found = made.stat()
        self.write_state(replace(self.state, finished=(found.st_dev, found.st_ino)))

    # -- details ---------------------------------------------------------------------------------

    def write_state(self, state: State) -> None:
        """Write `run.json` in one step."""
        try:
            files.write_json(self.partial / STATE, asdict(state))
        except OSError as error:
            raise files.cannot_write(error, self.partial) from error
        self.state = state

    def state_text(self) -> str:
        """The content of `run.json`, by which another process recognises the folder."""
        return (self.partial / STATE).read_text(encoding="utf-8")

    def restore_old_output(self) -> None:
        """Restore the name of an old output, if a kill came between two renames."""
        if self.old_output.exists() and not os.path.lexists(self.output):
            self.old_output.rename(self.output)

    def is_waste(self, error: BaseException) -> bool:
        """Whether an error has left nothing worth keeping."""
        if self.whole:
            return False
        if self.state is None or self.state.identity is None:
            return True
        lasting = isinstance(error, SecateurError) and not _has_ended(error)
        return lasting and not self.resumed and not self.worth_resuming()

    def has_results(self) -> bool:
        """Whether the work has the folder of a step; single files are only its preparation."""
        return any(entry.is_dir() for entry in self.work.iterdir())

    @property
    def empty_mark(self) -> Path:
        """A file that marks the folder as ours, with nothing to resume; replaces the state."""
        return self.partial / (STATE + files.UNFINISHED)

    def remove_contents(self) -> None:
        """Remove everything except the state, or except the mark if nothing can be resumed.

        It needs no space, because the disk may be full.
        """
        # first the state: a kill from here on leaves a folder that is ours and resumes nothing
        if not self.finished and (self.partial / STATE).exists():
            (self.partial / STATE).replace(self.empty_mark)
        for entry in self.partial.iterdir():
            if entry.name == STATE or entry == self.empty_mark:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove(self) -> None:
        """Remove the partial folder; the file that marks it as ours goes last."""
        self.remove_contents()
        for file in (self.empty_mark, self.partial / STATE):
            file.unlink(missing_ok=True)
        self.partial.rmdir()


def check_output(
    output: str | Path | None,
    verb: str,
    needed_bytes: int,
    read: Iterable[str | Path | None],
    call: Mapping[str, Any],
    kind: Callable[..., RunFolder] = RunFolder,
) -> None:
    """Refuse an output that a run of a verb would be refused for. Writes nothing.

    Args:
        output: the folder of the result; None to check nothing.
        verb: the name of the command on the command line.
        needed_bytes: the bytes that the run would write.
        read: files and folders that the run would read; names that are no path are ignored.
        call: `resume`, `restart` and `overwrite`, as far as they are given.
        kind: makes the folder of the run.

    Raises:
        SecateurError: as the run would.
    """
    if output is None:
        return
    names = ("resume", "restart", "overwrite")
    folder = kind(output, verb, **{name: bool(call.get(name)) for name in names})
    folder.keep_apart(*read)
    files.check_free(needed_bytes, folder.output, folder.partial)


def _has_ended(error: BaseException) -> bool:
    """Whether memory or disk has ended during the work. A run that does not fit is refused."""
    cause = error.__cause__
    return isinstance(error, MemoryBudgetError) and (
        _has_ended(cause) if isinstance(cause, SecateurError) else cause is not None
    )


BLOCK_BYTES = 2**22
LONGEST = 120
"""The most characters of a value that an error shows."""


class _StoredFile(NamedTuple):
    """A file or folder in an identity.

    Attributes:
        spelled: its name, as the user wrote it.
        sha256: of its content.
    """

    spelled: str
    sha256: str

    @classmethod
    def of(cls, value: Any) -> Any:
        """The file that an entry of an identity describes; any other entry stays as it is."""
        described = isinstance(value, Mapping) and value.keys() == {*cls._fields}
        return cls(**value) if described else value


def file_digests(files: Iterable[Path], progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of files by name, because the inputs of a stopped run must not change.

    Args:
        files: to read.
        progress: receives the steps, each a block of 4 MiB.
    """
    files, progress = list(files), progress or Silent()
    blocks = sum(-(-file.stat().st_size // BLOCK_BYTES) for file in files)
    progress.start("SHA-256 of source", max(1, blocks))
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
                progress.step(note=file.name)
        found[file.name] = digest.hexdigest()
    progress.finish()
    return found


def content_of(path: str) -> Any:
    """A file or folder as an identity holds it: by its content. Any other name stays a name.

    Args:
        path: as the user spelled it, for messages.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return path
    files = sorted(file for file in place.rglob("*") if file.is_file()) or [place]
    lines = [f"{file.relative_to(place)} {file_digests([file])[file.name]}" for file in files]
    return _StoredFile(path, hashlib.sha256("\n".join(lines).encode()).hexdigest())._asdict()


def _leaves(value: Any, place: str = "") -> dict[str, Any]:
    """The values in an identity by their place."""
    value = _StoredFile.of(value)
    inner: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple) and not isinstance(value, _StoredFile):
        inner = enumerate(value, start=1)
    else:
        return {place: value}
    start = f"{place}: " if place else ""
    return {key: x for name, own in inner for key, x in _leaves(own, f"{start}{name}").items()}


def differences(before: Any, now: Any, *, finished: bool = False) -> list[str]:
    """The differences between two identities, a sentence for each; none for the same run.

    Args:
        before: an identity, or a part of it.
        now: the same part of the other one.
        finished: whether the run is finished.
    """
    one, other = _leaves(before), _leaves(now)
    found = []
    for place in sorted(one.keys() | other.keys()):
        then, here = one.get(place), other.get(place)
        name, named = (x.spelled if isinstance(x, _StoredFile) else x for x in (then, here))
        content, held = (x.sha256 if isinstance(x, _StoredFile) else x for x in (then, here))
        both = isinstance(then, _StoredFile) and isinstance(here, _StoredFile)
        if content == held or (name == named and not (finished and both)):
            continue
        line = f"{place}: {name!r} then, {named!r} now"
        if name == named:
            line = f"{place}: the content of {named} has changed"
        found.append(line if len(line) <= 2 * LONGEST else f"{place} has changed")
    return found


def refuse_another(before: Any, now: Any, where: Path, *, finished: bool = False) -> None:
    """Refuse to resume a different run.

    Args:
        before: the identity that the earlier run stored.
        now: the identity of the run that would resume it.
        where: the earlier run.
        finished: whether it is finished; otherwise it was stopped.

    Raises:
        RecipeError: the identities differ; lists the differences.
    """
    if found := differences(before, json.loads(json.dumps(now)), finished=finished):
        raise RecipeError(
            f"the {'finished' if finished else 'stopped'} run was a different one "
            f"({'; '.join(found)})",
            where=str(where),
            remedy="choose another --output, or replace the result with --overwrite"
            if finished
            else "repeat the options of the first call, or start anew with --restart",
        )
