"""Hidden states: the input of the first decoder layer, what is stored between two, the logits.

The caller runs the layers in between: all layers, fewer layers, or layers with other weights.

Stored states (`Activations`) are in memory, or in a file if they do not fit. With a run folder, the
inputs of the current layer are always on disk as well, complete and under their final name. A
killed run resumes from these files. Each process of a run has the states of its own windows, and
writes them to a file of its own. The file's name has the range of windows, so any number of
processes can resume: each takes the states of its windows from the files that have them.

Gemma 3n and Gemma 4 hand each layer a vector for each token, looked up by its id and by the number
of the layer. For all layers together these vectors are several times as large as the hidden states.
So they are not stored for the run. When a layer's turn comes, they are computed from the token ids
for this layer alone, which costs one forward of what is before the layers. They stay until another
layer's turn comes: in memory, or in a file where hidden states are in files. They depend neither on
weights of the layers nor on masks, so the pruned and the dense model share them, and a resumed run
computes them again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import (
    LayerCall,
    StandIn,
    call_layer,
    first_inputs,
    layer_calls,
    replaced_layers,
    token_values,
    token_values_of_all,
)
from secateur.machine import exact_matmuls, fast_matmuls
from secateur.models.checkpoint import read_all, write_all
from secateur.models.targets import Target
from secateur.runs.output import cannot_write

STATES_BYTES = 1 << 30
"""Maximum size of the hidden states of one part in `EmbeddingAndHead.parts`."""


class _Injector(StandIn):
    """Replaces a decoder layer and returns the given hidden states for any input.

    Args:
        layer: the layer.
        call: how the model calls it.
        hidden: the hidden states to return; None for the layer's own input.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, hidden: Tensor | None) -> None:
        super().__init__(layer, call.in_tuple)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the given hidden states."""
        return super().forward(*args, **kwargs) if self.hidden is None else self.answer(self.hidden)


class EmbeddingAndHead:
    """Embeds windows, records how the layers are called, and turns hidden states into logits.

    Args:
        target: the model.
        windows: token ids [samples, sequence_length].
        folder: keeps what depends on the tokens besides hidden states; None for memory.
        own: the windows of this process; None for all.
        fast: whether the products of layers and head may be in bfloat16 (`fast_matmuls`).
    """

    def __init__(
        self,
        target: Target,
        windows: Tensor,
        folder: Path | None = None,
        own: slice | None = None,
        *,
        fast: bool = True,
    ) -> None:
        self.target, self.windows = target, windows
        self.recorded: dict[int, list[LayerCall]] = {}
        self.width: int | None = None  # of hidden states as they travel
        self.token_values = TokenValues(target, windows, folder, own)
        matmuls = fast_matmuls if fast else exact_matmuls
        self.matmuls: Callable[[], AbstractContextManager[object]] = partial(matmuls, target.device)

    def calls(self, size: int = 1) -> list[LayerCall]:
        """How the model calls each layer for a batch of `size` windows.

        Arguments that depend on the tokens are left out; `call` has them.
        """
        if size not in self.recorded:
            total, device = len(self.windows), self.target.device
            # Turned around, so that a single window also shows what depends on its tokens.
            last = self.windows[total - size :].flip(1)
            ids = [x.to(device) for x in (self.windows[:size], last)]
            with self.target.outside():
                calls = layer_calls(self.target.model, self.target.layers, ids)
            self.recorded[size] = [call.to(device).filled(None) for call in calls]
        return self.recorded[size]

    def call(self, number: int, rows: Sequence[int]) -> LayerCall:
        """How the model calls a layer for some windows.

        Args:
            number: number of the layer.
            rows: numbers of the windows.
        """
        call = self.calls(len(rows))[number]
        return call.filled(self.token_values.read(number, call, rows)) if call.varying else call

    def shared_tensors(self, number: int, sizes: set[int]) -> list[Tensor]:
        """Arguments of a layer that no forward owns, for batches of these sizes."""
        calls = [self.calls(size)[number] for size in sizes]
        held = [self.token_values.held(number, call) for call in calls if call.varying]
        return [*(x for x in held if x is not None), *(x for c in calls for x in c.tensors())]

    def embed(self, batches: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the inputs of the first layer, one batch of windows at a time.

        Yields:
            Hidden states [windows, sequence_length, hidden_size], packed where the model carries
            more than these from layer to layer (`PackedHiddenStates`).
        """
        model, layers, device = self.target.model, self.target.layers, self.target.device
        # how hidden states are packed is the same for every size of a batch
        calls = next(iter(self.recorded.values()), None) or self.calls()
        with self.target.outside():
            for rows in batches:
                hidden = first_inputs(model, layers, self.windows[rows].to(device))
                found = calls[0].packed(hidden)
                self.width = found.shape[-1]
                yield found

    def embedded(self, rows: Sequence[int]) -> list[Tensor]:
        """The inputs of the first layer for some windows, one tensor for each, for `run`."""
        return self.embedded_in([slice(row, row + 1) for row in rows])

    def embedded_in(self, batches: Sequence[slice]) -> list[Tensor]:
        """The inputs of the first layer for batches of windows, one tensor for each, for `run`.

        What depends on the tokens in any layer is appended to the hidden states, because `run` does
        not know which windows it passes.
        """
        found = list(self.embed(batches))
        calls = self.calls()
        if not any(call.varying for call in calls):
            return found
        model, layers, device = self.target.model, self.target.layers, self.target.device
        with self.target.outside():
            return [
                torch.cat(
                    [x, token_values_of_all(model, layers, ids.to(device), calls).to(x.dtype)], -1
                )
                for x, ids in zip(found, (self.windows[rows] for rows in batches), strict=True)
            ]

    def parts(self, rows: Sequence[int], copies: int) -> Iterator[list[int]]:
        """Split windows into parts whose hidden states fit into `STATES_BYTES`.

        Args:
            rows: numbers of windows.
            copies: number of hidden states of each window in memory at once.
        """
        (hidden,) = self.embedded(rows[:1])
        size = max(1, STATES_BYTES // (copies * hidden.numel() * hidden.element_size()))  # windows
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    def run(self, number: int, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Pass the hidden states of a batch of windows through a layer.

        Args:
            number: number of the layer.
            layer: the layer, or a function with the same arguments.
            hidden: [windows, sequence_length, hidden_size].
        """
        call = self.calls(len(hidden))[number]
        hidden, values = self._split(hidden)
        if call.varying:
            assert values is not None
            # the values of all layers stand side by side, in the order of the layers
            start = sum(before.columns for before in self.calls()[:number])
            call = call.filled(values[..., start : start + call.columns])
        with self.matmuls():
            out = call_layer(layer, hidden, call)
        return out if values is None else torch.cat([out, values], -1)

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The hidden states, and what depends on the tokens if `embedded` has put it there."""
        if self.width is None or hidden.shape[-1] == self.width:
            return hidden, None
        return hidden[..., : self.width], hidden[..., self.width :]

    def states(self, hidden: Tensor) -> Tensor:
        """The hidden states alone: [1, sequence_length, width]."""
        return self.calls()[0].states(self._split(hidden)[0])

    @contextmanager
    def outside(self) -> Iterator[None]:
        """A context in which everything outside the layers has its weights, for `head`."""
        self.calls()  # contexts of a target do not nest, so the calls are recorded before
        with self.target.outside():
            yield

    def head(self, row: int, hidden: Tensor) -> Tensor:
        """Return the logits for the last layer's output for one window.

        Call this only within `outside()`.

        Args:
            row: number of the window.
            hidden: [1, sequence_length, hidden_size].

        Returns:
            [sequence_length, vocabulary], in the dtype of the model.
        """
        ids = self.windows[row : row + 1].to(self.target.device)
        with self.returning(hidden):
            logits: Tensor = self.target.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def returning(self, hidden: Tensor | None) -> Iterator[None]:
        """A context in which every decoder layer returns these hidden states.

        So the model computes what follows its last layer. Use it only within `outside()`.

        Args:
            hidden: [windows, sequence_length, hidden_size]; None lets the layers return their own
                inputs.
        """
        layers, calls = self.target.layers, self.calls()
        injectors: list[nn.Module] = [
            _Injector(
                layer, call, None if hidden is None else call.unpacked(self._split(hidden)[0])
            )
            for layer, call in zip(layers, calls, strict=True)
        ]
        with replaced_layers(layers, injectors):
            yield


class TokenValues:
    """The values of one layer at a time, for the windows of this process.

    Args:
        target: the model.
        windows: token ids [samples, sequence_length].
        folder: a folder in it keeps the values; None for memory.
        own: the windows of this process; None for all.
    """

    def __init__(
        self, target: Target, windows: Tensor, folder: Path | None, own: slice | None = None
    ) -> None:
        self.target, self.windows = target, windows
        self.own = own or slice(0, len(windows))
        # One for each process, because each computes its values when it is ready.
        name = f"token-values.{self.own.start}-{self.own.stop}"
        self.folder = None if folder is None else folder / name
        self.layer: int | None = None
        self.values: Activations | None = None

    def read(self, layer: int, call: LayerCall, rows: Sequence[int]) -> Tensor:
        """The values of a layer for some windows: [windows, sequence_length, columns].

        Args:
            layer: number of the layer.
            call: its call, which says what depends on the tokens.
            rows: numbers of the windows.
        """
        values = self.of(layer, call)
        found = [values.read(slice(row, row + 1)) for row in rows]
        return torch.cat(found).to(self.target.device)

    def held(self, layer: int, call: LayerCall) -> Tensor | None:
        """The values of a layer for all windows, if they are in memory."""
        return self.of(layer, call).held

    def of(self, layer: int, call: LayerCall) -> Activations:
        """The values of a layer; computed when its turn comes."""
        if self.values is None or self.layer != layer:
            self.close()
            self.values, self.layer = self.computed(layer, call), layer
        return self.values

    @torch.no_grad()
    def computed(self, layer: int, call: LayerCall) -> Activations:
        """Compute the values of a layer, one window at a time."""
        target, stored = self.target, None
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
        with target.outside(), exact_matmuls(target.device):
            for row in range(self.own.start, self.own.stop):
                rows = slice(row, row + 1)
                ids = self.windows[rows].to(target.device)
                found = token_values(target.model, target.layers, ids, layer, call)
                if stored is None:
                    shape = (len(self.windows), *found.shape[1:])
                    in_memory = self.folder is None
                    stored = Activations(shape, found.dtype, self.folder, in_memory, self.own)
                stored.write(rows, found)
        assert stored is not None
        stored.advance(layer)
        return stored

    def close(self) -> None:
        """Release the values."""
        if self.values is not None and self.layer is not None:
            self.values.forget(self.layer)
        self.values = self.layer = None


_HOST = torch.device("cpu")
_RANGE = re.compile(r"\.(\d+)-(\d+)\.bin")
"""The windows in the name of a file: the first one, and the one after the last."""


class Activations:
    """Inputs of the current layer, and the outputs that replace them.

    Args:
        shape: (samples, sequence_length, hidden_size).
        dtype: dtype of the computation.
        folder: folder of the files; None for a run in memory only.
        in_memory: whether they are in memory (as well).
        own: the windows of this process; None for all. All other ranges of windows are within it.
        home: in whose memory they are: the host's or a GPU's.
        every: with those in memory, only the inputs of each `every`-th layer are also written to
            files. A stopped run continues at such a layer.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path | None,
        in_memory: bool,
        own: slice | None = None,
        *,
        home: torch.device = _HOST,
        every: int = 1,
    ) -> None:
        self.shape, self.dtype, self.in_memory = shape, dtype, in_memory
        self.every = every if in_memory else 1
        self.folder, self.on_disk = folder or Path(), folder is not None
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize
        self.own = own or slice(0, shape[0])
        held = (self.own.stop - self.own.start, *shape[1:])
        # uninitialised: every window is written before it is read
        self.held = torch.empty(held, dtype=dtype, device=home) if in_memory else None
        self.layer = 0

    def file(self, layer: int) -> Path:
        """The file that holds the inputs of a layer for the windows of this process."""
        return self.folder / f"inputs-{layer:04d}.{self.own.start}-{self.own.stop}.bin"

    def files(self, layer: int) -> dict[Path, range]:
        """All files with inputs of a layer, and the windows of each."""
        if not self.on_disk:
            return {}
        found = {}
        for file in sorted(self.folder.glob(f"inputs-{layer:04d}.*.bin")):
            named = _RANGE.search(file.name)
            if named is not None:
                found[file] = range(int(named[1]), int(named[2]))
        return found

    def has(self, layer: int) -> bool:
        """Whether the inputs of this layer are on disk, for all windows of this process."""
        stored = self.files(layer).values()
        return all(
            any(row in rows for rows in stored) for row in range(self.own.start, self.own.stop)
        )

    def resume(self, layer: int) -> None:
        """Continue with the stored inputs of a layer."""
        self.layer = layer
        if self.held is not None:
            for row in range(self.own.start, self.own.stop):
                self.held[row - self.own.start] = self.stored(slice(row, row + 1))[0]

    def read(self, rows: slice) -> Tensor:
        """The inputs of the current layer for some windows: [rows, sequence_length, hidden]."""
        if self.held is not None:
            return self.held[self.within(rows)]
        return self.stored(rows)

    def stored(self, rows: slice) -> Tensor:
        """The inputs of the current layer on disk, for some windows."""
        own = self.file(self.layer)
        if own.exists():
            return self.from_file(own, rows, self.own.start)
        files = self.files(self.layer)  # of processes that have shared the windows in another way
        found = []
        for row in range(rows.start, rows.stop):
            file = next(file for file, there in files.items() if row in there)
            found.append(self.from_file(file, slice(row, row + 1), files[file].start))
        return torch.cat(found)

    def write(self, rows: slice, hidden: Tensor) -> None:
        """Store the outputs of the current layer for some windows.

        In memory they overwrite the inputs of these windows, which are no longer needed.
        """
        if self.held is not None:
            self.held[self.within(rows)] = hidden
            return
        file = self.unfinished()
        try:
            with open(os.open(file, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as stream:
                stream.seek(self.within(rows).start * self.row_bytes)  # windows come in any order
                write_all(stream, hidden.to("cpu", self.dtype).contiguous())
        except OSError as error:
            raise cannot_write(error, file) from error

    def advance(self, layer: int) -> None:
        """Make the newly stored outputs the inputs of `layer`, and sync them to disk."""
        self.layer = layer
        # a process may have no windows
        if not self.on_disk or self.own.start == self.own.stop or layer % self.every:
            return
        file = self.unfinished()
        try:
            if self.held is not None:
                with file.open("wb", buffering=0) as stream:
                    for row in self.held:  # from a GPU, one window at a time
                        write_all(stream, row.cpu())
            file.replace(self.file(layer))  # complete under this name, or not there at all
        except OSError as error:
            raise cannot_write(error, file) from error

    def forget(self, layer: int) -> None:
        """Delete the inputs of a finished layer, also those that other processes have stored."""
        for file in self.files(layer):
            file.unlink(missing_ok=True)

    def forget_all_but(self, layer: int) -> None:
        """Delete what stopped runs have stored, except the inputs of a layer."""
        if not self.on_disk:
            return
        kept = self.files(layer)
        for file in self.folder.glob("inputs-*.bin"):
            if file not in kept:
                file.unlink(missing_ok=True)  # another process may be first

    def unfinished(self) -> Path:
        """The temporary file of the outputs, until all are written."""
        return self.folder / f"outputs.{self.own.start}-{self.own.stop}.unfinished"

    def within(self, rows: slice) -> slice:
        """A range of windows, counted from the first window of this process."""
        return slice(rows.start - self.own.start, rows.stop - self.own.start)

    def from_file(self, file: Path, rows: slice, first: int) -> Tensor:
        """Read some windows from a file whose first window is `first`."""
        hidden = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=self.dtype)
        with file.open("rb", buffering=0) as stream:
            stream.seek((rows.start - first) * self.row_bytes)
            read_all(stream, hidden)
        return hidden
