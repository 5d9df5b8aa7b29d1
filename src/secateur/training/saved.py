"""The files that a running training saves, so that it can resume after any stop.

    FOLDER/state.safetensors    weights in float32, moments, masks; in its header, the progress
    FOLDER/best.safetensors     weights in float32 at the best validation
    FOLDER/log.jsonl            one line for every step: loss, learning rate, norm of the gradient

A file is complete, or it does not exist. There are no pickles. The files hold whole tensors, so a
different number of processes can resume.

The contract of a hook: work that the training loop does after every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.errors import MemoryBudgetError, RecipeError
from secateur.models.checkpoint import ShardWriter
from secateur.runs.output import cannot_write
from secateur.training.masks import as_part, is_shared, local, rows_of, whole
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
        unfinished = self.file.with_suffix(".unfinished")
        self.written(unfinished, "w", self.lines)
        unfinished.rename(self.file)

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
        try:
            with file.open(mode, encoding="utf-8") as stream:
                stream.write("".join(json.dumps(x) + "\n" for x in lines))
        except OSError as error:
            raise cannot_write(error, file) from error


class Saved:
    """The files of a training.

    Args:
        folder: folder of the files; None keeps the best weights in memory and saves nothing.
        processes: the processes; the main one writes.
        identity: everything that affects the result; a resumed run must have the same.
    """

    def __init__(
        self, folder: Path | None, processes: ProcessGroup, identity: Mapping[str, Any]
    ) -> None:
        self.folder, self.processes = folder, processes
        self.identity = json.loads(json.dumps(identity))
        self.in_memory: dict[str, Tensor] | None = None
        if folder is not None and processes.main:
            folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder / "log.jsonl" if folder is not None and processes.main else None)

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
        """Write the state for a resumed training."""
        file = self.file("state")
        if file is None:
            return
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, parameter in parameters.items():
            tensors[f"weights/{name}"] = parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"moments/{name}/{key}"] = value
                elif value is not None:
                    numbers[f"moments/{name}/{key}"] = value
        tensors |= _changed_by(hooks)
        stored = {"identity": self.identity, "numbers": numbers, **facts}
        self.write(file, tensors, {FACTS: json.dumps(stored)})

    def load_state(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        hooks: Sequence[Hook],
    ) -> dict[str, Any] | None:
        """Load the saved state of an earlier run. Return its facts, or None without a saved state.

        Raises:
            RecipeError: the state belongs to another training.
        """
        file, facts = self.file("state"), self.facts()
        if file is None or not facts:
            return None
        self.check(facts["identity"])
        with safe_open(file, framework="pt") as stored:
            names, fused = set(stored.keys()), bool(optimizer.defaults.get("fused"))
            for name, parameter in parameters.items():
                _put(stored, f"weights/{name}", parameter)
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

    def load_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the weights of the saved state, if there is one."""
        file = self.file("state")
        if file is not None and file.exists():
            with safe_open(file, framework="pt") as stored:
                for name, parameter in parameters.items():
                    _put(stored, f"weights/{name}", parameter)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse to resume another training."""
        differing = [k for k in self.identity if identity.get(k) != self.identity[k]]
        if differing:
            key = differing[0]
            raise RecipeError(
                f"the stopped training was another one: {', '.join(differing)} differ; "
                f"{key} was {identity.get(key)!r}, now {self.identity[key]!r}",
                where=str(self.folder),
                remedy="resume with the same options, or begin anew with --restart",
            )

    def keep_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the current weights as the best so far."""
        file = self.file("best")
        if file is None:
            self.in_memory = {n: p.detach().clone() for n, p in parameters.items()}
            return
        self.write(file, parameters, {})

    def restore_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Load the best weights into the parameters, if there are any."""
        file = self.file("best")
        if self.in_memory is not None:
            with torch.no_grad():
                for name, value in self.in_memory.items():
                    parameters[name].copy_(value)
        elif file is not None and file.exists():
            with safe_open(file, framework="pt") as stored:
                for name, parameter in parameters.items():
                    _put(stored, name, parameter)

    def keep_final(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write the final weights. The checkpoint is made from them."""
        file = self.file("final")
        if file is not None:
            self.write(file, parameters, {})

    def write(self, file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a file; all processes must call this together.

        Raises:
            MemoryBudgetError: the disk is full; the earlier files remain.
        """
        write_whole(file, tensors, metadata, writes=self.processes.main)
        self.processes.wait()


def stored_tensors(file: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file with this prefix, one at a time, by their names without it."""
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            if name.startswith(prefix):
                yield name.removeprefix(prefix), stored.get_tensor(name)


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
        with ShardWriter(unfinished, known, [], metadata) if writes else _nobody() as to:
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
        unfinished.rename(file)


def _changed_by(hooks: Sequence[Hook]) -> dict[str, Tensor]:
    """The tensors that hooks change, by their names in the file."""
    return {f"hooks/{i}/{n}": x for i, hook in enumerate(hooks) for n, x in hook.state().items()}


def _nobody() -> AbstractContextManager[None]:
    """The context of a process that does not write the file."""
    return nullcontext()


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
