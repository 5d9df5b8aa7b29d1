"""The folder of a run, from the first check to the name that its result gets.

    OUTPUT.partial/run.json   which run this is, who works on it, and how far it is
    OUTPUT.partial/work/      what a resumed run reads
    OUTPUT.partial/model/     the result, which becomes OUTPUT by one rename

Every verb that writes a folder uses it. Nothing that a resumed run reads goes before the rename; an
old output stays until the new one has its name; two runs never work on one folder; what was not
made by such a run is never removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.errors import MemoryBudgetError, RecipeError, SecateurError
from secateur.runs.atomic import UNFINISHED, take_name, write_json
from secateur.runs.identity import refuse_another
from secateur.runs.lock import Lock, holder, in_use
from secateur.runs.output import (
    cannot_write,
    check_apart,
    check_replaceable,
    check_writable,
    is_full,
)

__all__ = ["NOTES", "RunFolder"]

NOTES = "secateur"
"""The folder within a model's folder that holds recipe, manifest and records of its runs."""

STATE = "run.json"


@dataclass(frozen=True)
class State:
    """What `run.json` says.

    Attributes:
        verb: that works here.
        identity: everything the result depends on; None while there is nothing to resume.
        finished: device and inode of the result, written down before it gets its name.
        process: number of the process that works here, or worked here last.
        host: the machine it runs on.
        since: when it began, in local time.
    """

    verb: str
    identity: dict[str, Any] | None = None
    finished: tuple[int, int] | None = None
    process: int = 0
    host: str = ""
    since: str = ""


class RunFolder:
    """The folder of one run; a context manager, entered when the work begins.

    The constructor only looks. Entering makes `OUTPUT.partial` and locks it. Leaving it after an
    error keeps what can be resumed, and removes what cannot.

    Args:
        output: the folder that the result becomes.
        verb: the command, as it is called on the command line.
        resume: go on with a stopped run; start, if there is none.
        restart: discard a stopped run.
        overwrite: replace the model that is there.

    Raises:
        RecipeError: `output` is missing or taken, or a stopped run lies there.
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
        self.output = Path(os.path.abspath(output))
        check_writable(self.output)
        self.verb, self.overwrite, self.restart = verb, overwrite, restart
        self.wants_resume = resume
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.worth_resuming: Callable[[], bool] = lambda: True
        self.whole = self.finished = self.resumed = False
        self.lock = Lock(self.partial)
        self.state = self.look()

    # -- places ----------------------------------------------------------------------------------

    @property
    def work(self) -> Path:
        """What a resumed run reads; it goes when the result has its name."""
        return self.partial / "work"

    @property
    def model(self) -> Path:
        """The result: in the partial folder, and under its own name when it is finished."""
        return self.output if self.finished else self.partial / "model"

    @property
    def notes(self) -> Path:
        """Recipe, manifest and records, within the result."""
        return self.model / NOTES

    @property
    def spare(self) -> Path:
        """Where an old output lies for a moment while it is replaced."""
        return self.partial / "replaced"

    # -- checks ----------------------------------------------------------------------------------

    def look(self) -> State | None:
        """Read what lies there, and refuse what cannot be done; writes nothing.

        Returns:
            The state of the stopped run to resume; None to start.
        """
        try:
            stopped = self.stopped()
            if self.lock.is_taken:
                raise in_use(None if stopped is None else asdict(stopped), self.partial)
            self.finished = self.wants_resume and self.has_name(stopped)
            begun = stopped if stopped is not None and stopped.identity is not None else None
            if begun is not None and not self.restart and not self.has_name(begun):
                self.check_stopped(begun)
            if not self.finished and not self.spare.exists():
                check_replaceable(self.output, self.overwrite)
        except OSError as error:
            raise cannot_write(error, self.output) from error
        return begun if self.wants_resume and not self.restart else None

    def check_stopped(self, stopped: State) -> None:
        """Refuse a stopped run that this call does not go on with."""
        if stopped.verb != self.verb:
            raise RecipeError(
                f"a stopped `secateur {stopped.verb}` lies where this run would work",
                where=str(self.partial),
                remedy="finish it with --resume, discard it with --restart, or choose another "
                "--output",
            )
        if not self.wants_resume:
            raise RecipeError(
                "a run to this folder was stopped half-way",
                where=str(self.partial),
                remedy="add --resume to go on with it, or --restart to discard it",
            )

    def stopped(self) -> State | None:
        """The state that an earlier run wrote into the partial folder.

        Raises:
            RecipeError: the folder is there, and no run has made it.
        """
        if not os.path.lexists(self.partial):
            return None
        try:
            told = json.loads((self.partial / STATE).read_text(encoding="utf-8"))
            finished = told.pop("finished", None)
            return State(**told, finished=tuple(finished) if finished else None)
        except FileNotFoundError:  # a run begins, or is being discarded
            left = {entry.name for entry in self.partial.iterdir()}
            if not left or self.mark.name in left:
                return None
        except (OSError, ValueError, TypeError):
            pass
        raise RecipeError(
            "a folder of this name is in the way, and no run of secateur has made it",
            where=str(self.partial),
            remedy="move it away, or choose another --output",
        )

    def has_name(self, stopped: State | None) -> bool:
        """Whether the result of a run has its name already."""
        if stopped is None or stopped.finished is None or not self.output.is_dir():
            return False
        found = self.output.stat()
        return stopped.finished == (found.st_dev, found.st_ino)

    def keep_apart(self, *read: str | Path | None) -> None:
        """Refuse an output that would replace what the run reads, or that lies within it.

        Args:
            *read: files and folders that the run reads; names that are no path are left alone.

        Raises:
            RecipeError: naming both.
        """
        for path in read:
            if path is not None:
                check_apart(path, self.output, self.partial)

    # -- the life of a run -----------------------------------------------------------------------

    def __enter__(self) -> RunFolder:
        try:
            if not self.lock.take():
                stopped = self.stopped()
                raise in_use(None if stopped is None else asdict(stopped), self.partial)
            self.put_back()
            self.state = self.look()
            self.resumed = self.state is not None
            if self.state is None:
                self.clear()
            self.write_state(replace(self.state or State(self.verb), **holder(self.verb)))
            if not self.finished:
                self.work.mkdir(exist_ok=True)
                self.notes.mkdir(parents=True, exist_ok=True)
        except BaseException as error:
            self.lock.release()
            if isinstance(error, OSError):
                raise cannot_write(error, self.output) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.finished or (error is not None and self.is_waste(error)):
                self.remove()
        finally:
            self.lock.release()
        if error is not None and is_full(error):
            raise cannot_write(error, self.partial) from error

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Say what the result depends on: from now on, the run can be resumed.

        Raises:
            RecipeError: the stopped run had another identity.
        """
        assert self.state is not None
        if self.state.identity is not None:
            refuse_another(self.state.identity, identity, self.partial)
        else:
            self.write_state(replace(self.state, identity=json.loads(json.dumps(identity))))

    def fresh_model(self) -> Path:
        """The folder of the result, empty."""
        shutil.rmtree(self.model, ignore_errors=True)
        self.notes.mkdir(parents=True)
        return self.model

    def finish(self) -> None:
        """Give the result its name; then remove everything else.

        Raises:
            RecipeError: an output has appeared meanwhile; the result stays in the partial folder.
        """
        assert self.state is not None
        self.whole = True
        check_replaceable(self.output, self.overwrite, result=self.model)
        found = self.model.stat()
        self.write_state(replace(self.state, finished=(found.st_dev, found.st_ino)))
        try:
            take_name(self.model, self.output, self.spare)
        except FileExistsError:
            check_replaceable(self.output, self.overwrite, result=self.model)
            raise
        self.finished = True

    # -- details ---------------------------------------------------------------------------------

    def write_state(self, state: State) -> None:
        """Write `run.json` in one step."""
        try:
            write_json(self.partial / STATE, asdict(state))
        except OSError as error:
            raise cannot_write(error, self.partial) from error
        self.state = state

    def put_back(self) -> None:
        """Give an old output its name back, if a kill came between two renames."""
        if self.spare.exists() and not os.path.lexists(self.output):
            self.spare.rename(self.output)

    def is_waste(self, error: BaseException) -> bool:
        """Whether nothing that an error has left behind is worth keeping."""
        if self.whole:
            return False
        if self.state is None or self.state.identity is None:
            return True
        lasting = isinstance(error, SecateurError) and not isinstance(error, MemoryBudgetError)
        return lasting and not self.resumed and not self.worth_resuming()

    @property
    def mark(self) -> Path:
        """Instead of the state, says that the folder is ours and holds nothing to resume."""
        return self.partial / (STATE + UNFINISHED)

    def clear(self) -> None:
        """Remove all but the state, or but the mark where nothing can be resumed any more.

        Takes no space: the disk may be full.
        """
        if not self.finished and (self.partial / STATE).exists():
            (self.partial / STATE).replace(self.mark)
        for entry in self.partial.iterdir():
            if entry.name == STATE or entry == self.mark:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove(self) -> None:
        """Remove the partial folder; what says that it is ours goes last."""
        self.clear()
        for file in (self.mark, self.partial / STATE):
            file.unlink(missing_ok=True)
        self.partial.rmdir()
