"""The files that a running training saves, so that it can resume after any stop.

    FOLDER/state.safetensors    weights in float32, moments, masks; in its header, the progress
    FOLDER/best.safetensors     weights in float32 at the best validation
    FOLDER/log.jsonl            one line for every step: loss, learning rate, norm of the gradient

A file is complete, or it does not exist. There are no pickles. The files hold whole tensors, so a
different number of processes can resume. From the final weights the checkpoint is made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.errors import MemoryBudgetError, VerificationError
from secateur.models.checkpoint import CheckpointReader, PatchedCopy, ShardWriter
from secateur.models.skeleton import StoredModel, build_skeleton
from secateur.progress import Progress
from secateur.runs.output import writing
from secateur.training.masks import Masks, as_part, is_shared, local, rows_of, whole
from secateur.training.process_group import ProcessGroup

FACTS = "facts"


class Log:
    """The log of a training, written line by line.

    Args:
        file: file of the log; None keeps it in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.lines: list[dict[str, Any]] = []

    def begin(self, steps: int) -> None:
        """Start a new log, or continue after `steps` steps and drop later lines.

        Raises:
            MemoryBudgetError: the disk is full; the log is unchanged.
        """
        self.lines = []
        if self.file is None:
            return
        if steps and self.file.exists():
            written = self.file.read_text(encoding="utf-8").splitlines()
            self.lines = [json.loads(line) for line in written[:steps]]
        # what was logged after the last save is trained again, and written again
        unfinished = self.file.with_suffix(".unfinished")
        self.written(unfinished, "w", self.lines)
        unfinished.replace(self.file)

    def add(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            MemoryBudgetError: the disk is full.
        """
        self.lines.append(line)
        if self.file is not None:
            self.written(self.file, "a", [line])

    def written(self, file: Path, mode: str, lines: list[dict[str, Any]]) -> None:
        """Write lines, or raise an error if the disk is full."""
        with writing(file), file.open(mode, encoding="utf-8", newline="\n") as stream:
            stream.write("".join(json.dumps(x) + "\n" for x in lines))


class Saved:
    """The files of a training.

    Args:
        folder: folder of the files; None keeps the best weights in memory and saves nothing.
        processes: the processes; the main one writes.
    """

    def __init__(self, folder: Path | None, processes: ProcessGroup) -> None:
        self.folder, self.processes = folder, processes
        self.in_memory: dict[str, Tensor] | None = None
        if folder is not None and processes.first:
            folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder / "log.jsonl" if folder is not None and processes.first else None)

    def file(self, name: str) -> Path | None:
        """The path of one file; None without a folder."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def save_state(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        hooks: Sequence[Hook],
        facts: Mapping[str, Any],
    ) -> None:
        """Write the state for a resumed training, if there is a folder."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, parameter in parameters.items():
            tensors[f"weights/{name}"] = parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                # step counts are tensors or numbers, by the optimizer; numbers go to the header
                if isinstance(value, Tensor):
                    tensors[f"moments/{name}/{key}"] = value
                elif value is not None:
                    numbers[f"moments/{name}/{key}"] = value
        tensors |= _changed_by(hooks)
        self.write("state", tensors, {FACTS: json.dumps({"numbers": numbers, **facts})})

    def load_state(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        hooks: Sequence[Hook],
    ) -> dict[str, Any] | None:
        """Load the saved state of an earlier run, if there is one, and return its facts."""
        file, facts = self.file("state"), self.facts()
        if file is None or not facts:
            return None
        with safe_open(file, framework="pt") as stored:
            names, fused = set(stored.keys()), bool(optimizer.defaults.get("fused"))
            for name, parameter in parameters.items():
                _put(stored, f"weights/{name}", parameter)
                # an optimizer makes its state in its first step, so here it is set from outside
                start = f"moments/{name}/"
                state = {
                    key.removeprefix(start): _read_part(stored, key, parameter, fused)
                    for key in names
                    if key.startswith(start)
                }
                numbers = facts["numbers"].items()
                state |= {k.removeprefix(start): v for k, v in numbers if k.startswith(start)}
                if state:
                    optimizer.state[parameter] = state
            with torch.no_grad():
                for name, tensor in _changed_by(hooks).items():
                    tensor.copy_(stored.get_tensor(name))
        return facts

    def facts(self) -> dict[str, Any]:
        """Return the facts in the header of the saved state; empty without a saved state."""
        file = self.file("state")
        if file is None or not file.exists():
            return {}
        with safe_open(file, framework="pt") as stored:
            found: dict[str, Any] = json.loads(stored.metadata()[FACTS])
        return found

    def load_weights(
        self, parameters: Mapping[str, nn.Parameter], name: str = "state", prefix: str = "weights/"
    ) -> None:
        """Load the weights in a file, if it exists."""
        file = self.file(name)
        if file is not None and file.exists():
            with safe_open(file, framework="pt") as stored:
                for own, parameter in parameters.items():
                    _put(stored, f"{prefix}{own}", parameter)

    def keep_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the current weights as the best so far."""
        if self.folder is None:
            self.in_memory = {n: p.detach().clone() for n, p in parameters.items()}
        self.write("best", parameters)

    def restore_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best weights into the parameters, if there are any."""
        self.load_weights(parameters, "best", prefix="")
        with torch.no_grad():
            for name, value in (self.in_memory or {}).items():
                parameters[name].copy_(value)

    def remove(self) -> None:
        """Remove the folder with all files, if there is one."""
        if self.folder is not None:
            shutil.rmtree(self.folder)

    def write(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a file, if there is a folder; all processes must call this together.

        Raises:
            MemoryBudgetError: the disk is full; the earlier files remain.
        """
        file = self.file(name)
        if file is not None:
            write_whole(file, tensors, metadata, writes=self.processes.first)
            self.processes.wait()


class _OpenTensors(Mapping[str, Tensor]):
    """The tensors of an open file, each read on access."""

    def __init__(self, stored: Any) -> None:
        self.stored, self.names = stored, frozenset(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = self.stored.get_tensor(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextmanager
def open_tensors(file: Path) -> Iterator[Mapping[str, Tensor]]:
    """A context with the tensors of a file by name, each read on access."""
    with safe_open(file, framework="pt") as stored:
        yield _OpenTensors(stored)


def write_trained(
    source: Path, trained: Mapping[str, Tensor], made: Path, progress: Progress | None = None
) -> None:
    """Write a copy of a checkpoint with new values of trained parameters, one tensor at a time.

    The copy has the names, shapes, dtypes and files of the source. Tensors that were not trained
    are the same byte for byte.

    Args:
        source: the checkpoint.
        trained: the new values, by the names in the transformers model.
        made: the folder of the copy.
        progress: receives the copied files.
    """
    stored = _stored_model(source)
    copy = PatchedCopy(stored.reader, made)
    copy.create(progress)
    for name, tensor in stored.written(trained):
        copy.write(name, tensor)
    copy.sync()


def check_written(folder: Path, masks: Masks) -> None:
    """Read a trained checkpoint again, one parameter at a time. Each process checks its part.

    Raises:
        VerificationError: a pruned weight is not zero.
    """
    stored = _stored_model(folder)
    for name, mask in masks.kept.items():
        # each process has read the rows that it holds, and compares them with its part of the mask
        rows = rows_of(mask) if is_shared(mask) else slice(None)
        filled = int(stored.read(name)[rows][~local(mask).cpu()].count_nonzero())
        if filled:
            raise VerificationError(
                f"{filled} pruned weights are not zero in the files",
                where=f"{name} in {folder}",
                remedy="the files were changed after they were written, or this is a fault in "
                "secateur; what was trained is still in the work folder",
            )


def _stored_model(folder: Path) -> StoredModel:
    """The parameters of a checkpoint in the names of the transformers model."""
    return StoredModel(build_skeleton(folder, opened=False), CheckpointReader(folder))


def write_whole(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write a complete file or none. Only one whole tensor is in memory at a time.

    Args:
        file: a safetensors file.
        tensors: tensors by name. All processes together assemble a sharded tensor.
        metadata: text for the header of the file.
        writes: whether this process writes.

    Raises:
        MemoryBudgetError: the disk is full; an older file of this name remains.
    """
    unfinished, metadata = file.with_suffix(".unfinished"), metadata or {}
    known = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    try:
        with ShardWriter(unfinished, known, [], metadata) if writes else nullcontext() as to:
            # A sharded tensor is gathered by all processes, also those that write nothing.
            for name, tensor in tensors.items():
                value = whole(tensor)
                if to is not None:
                    to.write(name, value)
            if to is not None:
                to.close(metadata)
    except MemoryBudgetError:
        unfinished.unlink(missing_ok=True)
        raise
    if writes:
        unfinished.replace(file)


def _changed_by(hooks: Sequence[Hook]) -> dict[str, Tensor]:
    """The tensors that hooks change, by their names in the file."""
    return {f"hooks/{i}/{n}": x for i, hook in enumerate(hooks) for n, x in hook.state().items()}


@torch.no_grad()
def _put(stored: Any, key: str, parameter: nn.Parameter) -> None:
    """Set a parameter to a value from an open file."""
    local(parameter).copy_(local(_read_part(stored, key, parameter)))


def _read_part(stored: Any, key: str, parameter: Tensor, fused: bool = True) -> Tensor:
    """Read a tensor of an open file for a parameter, on its device and divided like it.

    The function reads only this process's rows, and copies them. A mapped tensor would keep
    its file on the disk after another file replaced it. A step count stays on the CPU unless the
    optimizer is fused, because torch needs it there.
    """
    device, file = local(parameter).device, stored.get_slice(key)
    # not of the shape of a weight: a step count, or the rows and columns of Adafactor
    if tuple(file.get_shape()) != tuple(parameter.shape):
        value: Tensor = stored.get_tensor(key)
        return value.to(device if value.ndim or fused else "cpu", copy=True)
    if is_shared(parameter):
        return as_part(file[rows_of(parameter)].to(device, copy=True), parameter)
    return stored.get_tensor(key).to(device, copy=True)


class Hook(Protocol):
    """Work after every step. A resumed training restores its state."""

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step.

        Args:
            step: the number of the step, 1 to `steps`.
            steps: number of steps in the plan.
            model: the model in training.
            optimizer: the optimizer of the model.
        """
        ...

    def state(self) -> Mapping[str, Tensor]:
        """The tensors that the hook changes in place, by name.

        The loop saves them with the weights. A resumed training copies the saved values into them.
        """
        ...
