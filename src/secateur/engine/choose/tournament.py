"""Measures the fitness of candidates on the whole model with one layer in memory.

All candidates pass through the layers together: each layer is read once, and candidates that are
equal up to a layer share their hidden states. For the dense model, the last hidden states are kept
instead of the logits. They become logits again for one window at a time, for all candidates
together. That costs one more output head in a stage, and no disk. Candidates are only ranked, so
less precise products are enough.

Every measured value is stored in a file. The decisions of a search depend only on these values, so
a stopped search quickly repeats them from the file and continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.engine.choose.dense_logits import DenseLogits
from secateur.engine.stream.ends import ModelEnds
from secateur.precision import fast_matmuls
from secateur.progress import Progress
from secateur.runs.folder import refuse_another
from secateur.runs.ledger import Ledger
from secateur.sparsity.evolution import Candidate

WINDOW_TOKENS = 512
"""Number of tokens in one call of the output head. Its logits are the largest tensors here."""

Version = Hashable
"""The version of one decoder layer in a candidate."""

Versions = tuple[Version, ...]
"""The versions of all decoder layers in a candidate. Equal beginnings share hidden states."""

LEFT_OUT: Version = 0
"""The version of a layer that a candidate drops."""


class Variants(Protocol):
    """The versions of decoder layers for one kind of candidates."""

    @property
    def dense(self) -> Version:
        """The version of a layer in the dense model."""
        ...

    def opened(
        self, number: int, layer: nn.Module
    ) -> AbstractContextManager[Callable[[Version], Callable[[Tensor], Tensor]]]:
        """A context that gives, for each version of a layer, its forward of hidden states.

        Args:
            number: number of the layer.
            layer: the layer with its dense weights. It gets them back afterwards.
        """
        ...


class Lockstep:
    """Passes candidates through the layers together, and compares their outputs.

    Args:
        ends: ends of the model, with the windows for the measurement.
        variants: the versions of its layers.
        objective: `divergence`: mean KL(dense ‖ candidate) of the next-token probabilities;
            `loss`: mean cross-entropy of the next tokens; both in nats per token.
        progress: receives the layers, in steps of size 0.
        reference: of the dense model, on the same windows, if `ends` are those of another model.
    """

    def __init__(
        self,
        ends: ModelEnds,
        variants: Variants,
        objective: str,
        progress: Progress,
        reference: Lockstep | None = None,
    ) -> None:
        self.ends, self.variants, self.objective = ends, variants, objective
        self.progress = progress
        self.reference = reference or self
        self.dense: list[Tensor] = []

    @torch.no_grad()
    def fitness(self, candidates: Sequence[Versions], rows: Sequence[int]) -> list[float]:
        """The mean loss or divergence of each candidate over some windows."""
        if self.objective == "divergence":
            self.reference.pass_dense()
        sums = dict.fromkeys(candidates, 0.0)
        for part in self.ends.parts(rows, 2 * len(sums)):
            hidden = self.last_hidden(list(sums), part)
            with self.outside():
                for place, row in enumerate(part):
                    measure = self.measure(row)
                    for candidate, states in hidden.items():
                        sums[candidate] += measure(self.logits(row, states[place]))
        return [sums[candidate] / len(rows) for candidate in candidates]

    def pass_dense(self) -> None:
        """Pass the dense model through the layers, unless it has been."""
        if self.dense:
            return
        dense = (self.variants.dense,) * len(self.ends.target.layers)
        for part in self.ends.parts(range(len(self.ends.windows)), 2):
            self.dense += self.last_hidden([dense], part)[dense]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """A context in which everything outside the layers has its weights, for `measure`."""
        with ExitStack() as stack:
            if self.objective == "divergence" and self.reference is not self:
                stack.enter_context(self.reference.ends.outside())
            stack.enter_context(self.ends.outside())
            yield

    def measure(self, row: int) -> Callable[[Tensor], float]:
        """A function from a candidate's logits for one window to its mean over tokens."""
        if self.objective == "divergence":
            reference = self.reference
            dense = DenseLogits.of(reference.logits(row, reference.dense[row]))
            return lambda logits: dense.divergence(logits) / len(logits)
        following = self.ends.windows[row, 1:].to(self.ends.target.device)
        return lambda logits: float(cross_entropy(logits[:-1].float(), following))

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """The logits of the last layer's output for one window."""
        with fast_matmuls(self.ends.target.device):
            return self.ends.head(row, hidden)

    def last_hidden(
        self, candidates: Sequence[Versions], rows: Sequence[int]
    ) -> Mapping[Versions, list[Tensor]]:
        """The last layer's outputs of each candidate for some windows."""
        target = self.ends.target
        states: dict[Versions, list[Tensor]] = {(): self.ends.embedded(rows)}
        for number in range(len(target.layers)):
            reached = list(dict.fromkeys(c[: number + 1] for c in candidates))
            following = {v: states[v[:-1]] for v in reached if v[-1] == LEFT_OUT}
            if len(following) < len(reached):
                # A layer that no candidate keeps is not read.
                with (
                    target.layer(number) as layer,
                    self.variants.opened(number, layer) as forward_of,
                ):
                    for versions in reached:
                        if versions not in following:
                            forward = forward_of(versions[-1])
                            following[versions] = [forward(x) for x in states[versions[:-1]]]
            states = following
            self.progress.step(0, note=f"{len(reached)} candidates in layer {number}")
        return states


class Tournament:
    """The fitness of candidates, from the file of measured values or else from the model.

    Args:
        lockstep: measures candidates that are not in the file.
        versions: returns a candidate's version of each layer.
        file: file of the values; None keeps them in memory only.
        fingerprint: everything that affects the values.

    Raises:
        RecipeError: the file has another fingerprint.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        versions: Callable[[Candidate], Versions],
        file: Path | None,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.lockstep, self.versions = lockstep, versions
        self.ledger = Ledger(file)
        self.values: dict[tuple[Candidate, tuple[int, ...]], float] = {}
        self.notes: dict[str, Any] = {}
        if self.ledger.begun:
            self.ledger.resume()
        if not self.ledger.entries:
            self.ledger.begin()
            self.ledger.append({"fingerprint": dict(fingerprint)})
        refuse_another(self.ledger.entries[0]["fingerprint"], fingerprint, file or Path())
        for entry in self.ledger.entries[1:]:
            if "note" in entry:
                self.notes[entry["note"]] = entry["value"]
                continue
            rows = tuple(entry["windows"])
            for candidate, value in zip(entry["candidates"], entry["values"], strict=True):
                self.values[tuple(candidate), rows] = value

    def noted(self, name: str, measure: Callable[[], Any]) -> Any:
        """Another value of the model, measured once. It must be valid JSON."""
        if name not in self.notes:
            self.notes[name] = measure()
            self.ledger.append({"note": name, "value": self.notes[name]})
        return self.notes[name]

    def __call__(self, candidates: Sequence[Candidate], tokens: int, draw: int) -> list[float]:
        """The fitness of candidates (`sparsity.evolution.Fitness`).

        Args:
            candidates: the candidates to measure.
            tokens: number of tokens to measure on, in whole windows, at least one window.
            draw: chooses the windows if not all are used.
        """
        total, length = self.lockstep.ends.windows.shape
        count = min(max(1, tokens // length), total)
        first = 0 if count == total else draw * count
        rows = tuple((first + i) % total for i in range(count))
        new = [c for c in dict.fromkeys(candidates) if (c, rows) not in self.values]
        if new:
            found = self.lockstep.fitness([self.versions(c) for c in new], rows)
            self.values |= {(c, rows): value for c, value in zip(new, found, strict=True)}
            self.ledger.append({"windows": rows, "candidates": new, "values": found})
        return [self.values[candidate, rows] for candidate in candidates]


def cut_windows(windows: Tensor, tokens: int) -> Tensor:
    """Windows of at most 512 tokens, about `tokens` in all, spread over the calibration."""
    length = min(windows.shape[1], WINDOW_TOKENS, tokens)
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    count = min(max(1, tokens // length), len(pieces))
    return pieces[torch.arange(count) * len(pieces) // count]


def fingerprint(
    ends: ModelEnds, tokens: int, objective: str, units: Sequence[str]
) -> dict[str, Any]:
    """Everything that affects measured values.

    Args:
        ends: ends of the model, with the calibration windows.
        tokens: number of tokens in the last stage.
        objective: objective of `Lockstep`.
        units: names of the units of candidates.
    """
    return {
        "windows": checksum(ends.windows),
        "judged_tokens": tokens,
        "objective": objective,
        "embedded": checksum(ends.embedded([0])[0]),
        "units": list(units),
    }


def checksum(tensor: Tensor) -> str:
    """CRC-32 of the bytes of a tensor, in hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{crc32(data.numpy().tobytes()):08x}"
