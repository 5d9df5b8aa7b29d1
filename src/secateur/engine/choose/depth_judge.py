"""What it costs the model to lose a set of layers or sub-blocks, with one layer in memory.

All candidates pass the layers in lock-step, as in `engine.choose.tournament`: a layer is read
once, and candidates that keep the same up to it share their hidden states. A layer that a
candidate lost costs it nothing. Of the dense model the last hidden states are kept, not the logits.

Every value that was measured goes to a file. Greedy removal and search depend on nothing else, so
what was killed is done again from that file in no time and goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.engine.choose.depth_space import WHOLE, Candidate, Space
from secateur.engine.choose.depth_stream import Stream
from secateur.engine.choose.tournament import DenseLogits
from secateur.progress import Progress
from secateur.runs.identity import refuse_another
from secateur.runs.ledger import Ledger

__all__ = ["Judge", "Measured"]

Kept = tuple[int, ...]
"""The sub-blocks that each layer keeps."""


class Judge:
    """Measures candidates on calibration windows.

    Args:
        stream: the windows and the model they pass.
        objective: `divergence`: mean KL(dense ‖ candidate) of the next-token probabilities, in
            nats per token; `loss`: mean cross-entropy of the next tokens, in nats.
        progress: told of the layers, in steps of no size.
    """

    def __init__(self, stream: Stream, objective: str, progress: Progress) -> None:
        self.stream, self.objective, self.progress = stream, objective, progress
        self.dense: list[Tensor] = []

    @torch.no_grad()
    def fitness(self, candidates: Sequence[Kept], rows: Sequence[int]) -> list[float]:
        """The mean loss or divergence of each candidate over some windows."""
        if self.objective == "divergence" and not self.dense:
            whole = (WHOLE,) * len(self.stream.calls)
            every = range(len(self.stream.windows))
            for part in self.stream.parts(every, 2):
                self.dense += self.last_hidden([whole], part)[whole]
        sums = dict.fromkeys(candidates, 0.0)
        for part in self.stream.parts(rows, 2 * len(sums)):
            hidden = self.last_hidden(list(sums), part)
            with self.stream.target.outside():
                for place, row in enumerate(part):
                    measure = self.measure(row)
                    for candidate, states in hidden.items():
                        sums[candidate] += measure(self.stream.logits(row, states[place]))
        return [sums[candidate] / len(rows) for candidate in candidates]

    def measure(self, row: int) -> Callable[[Tensor], float]:
        """What turns a candidate's logits for one window into its mean over tokens."""
        if self.objective == "divergence":
            dense = DenseLogits.of(self.stream.logits(row, self.dense[row]))
            return lambda logits: dense.divergence(logits) / len(logits)
        following = self.stream.windows[row, 1:].to(self.stream.target.device)
        return lambda logits: float(cross_entropy(logits[:-1].float(), following))

    def last_hidden(
        self, candidates: Sequence[Kept], rows: Sequence[int]
    ) -> Mapping[Kept, list[Tensor]]:
        """The last layer's outputs for some windows, of each candidate."""
        states: dict[Kept, list[Tensor]] = {(): self.stream.first(rows)}
        for index in range(len(self.stream.calls)):
            ends = list(dict.fromkeys(c[: index + 1] for c in candidates))
            following: dict[Kept, list[Tensor]] = {e: states[e[:-1]] for e in ends if not e[-1]}
            if len(following) < len(ends):
                with self.stream.target.layer(index) as layer:
                    for end in ends:
                        if end[-1]:
                            following[end] = [
                                self.stream.run(index, layer, x, end[-1]) for x in states[end[:-1]]
                            ]
            states = following
            self.progress.step(0, note=f"{len(ends)} candidates in layer {index}")
        return states


class Measured:
    """The fitness of candidates, from the file of what was measured or else from the judge.

    Args:
        space: what can be dropped.
        judge: measures what is not known yet.
        file: where values are kept; None for memory only.
        fingerprint: what values depend on; a file of others is refused.
    """

    def __init__(
        self, space: Space, judge: Judge, file: Path | None, fingerprint: dict[str, Any]
    ) -> None:
        self.space, self.judge = space, judge
        self.ledger = Ledger(file)
        self.values: dict[tuple[Candidate, tuple[int, ...]], float] = {}
        self.influence: list[float] | None = None
        if self.ledger.begun:
            self.ledger.resume()
        if not self.ledger.entries:
            self.ledger.begin()
            self.ledger.append({"fingerprint": fingerprint})
        refuse_another(self.ledger.entries[0]["fingerprint"], fingerprint, file or Path())
        for entry in self.ledger.entries[1:]:
            if "influence" in entry:
                self.influence = entry["influence"]
                continue
            rows = tuple(entry["windows"])
            for dropped, value in zip(entry["dropped"], entry["values"], strict=True):
                self.values[tuple(dropped), rows] = value

    def keep_influence(self, influence: list[float]) -> None:
        """Write down the influence of the units."""
        self.influence = influence
        self.ledger.append({"influence": influence})

    def __call__(self, candidates: Sequence[Candidate], tokens: int, draw: int) -> list[float]:
        """The fitness of candidates on all windows, or on the part of them that `draw` chooses."""
        total, length = self.judge.stream.windows.shape
        count = min(max(1, tokens // length), total)
        first = 0 if count == total else draw * count
        rows = tuple((first + i) % total for i in range(count))
        new = [c for c in dict.fromkeys(candidates) if (c, rows) not in self.values]
        if new:
            found = self.judge.fitness([self.space.kept(c) for c in new], rows)
            self.values |= {(c, rows): value for c, value in zip(new, found, strict=True)}
            self.ledger.append({"windows": rows, "dropped": new, "values": found})
        return [self.values[candidate, rows] for candidate in candidates]
