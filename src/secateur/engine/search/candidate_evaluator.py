"""Measures candidates on the whole model with one layer in memory.

All candidates pass through the layers together: each layer is read once, and candidates that are
equal up to a layer share their hidden states. For the dense model, the last hidden states are kept
instead of the logits. They become logits again for one window at a time, for all candidates
together. That costs one more output head in a stage, and no disk. Where candidates are only ranked
and lose much, products in bfloat16 are enough (`EmbeddingAndHead`).

Every measured value is stored in a file. The decisions of a search depend only on these values, so
a stopped search quickly repeats them from the file and continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from secateur.engine.stream.hidden_states import EmbeddingAndHead
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

DENSE: Version = "dense"
"""The version of a layer in the dense model."""

LEFT_OUT: Version = 0
"""The version of a layer that a candidate drops."""

ForwardOf = Callable[[Version], Callable[[Tensor], Tensor]]
"""For each version of a layer, its forward of hidden states."""

Opened = Callable[[int, nn.Module], AbstractContextManager[ForwardOf]]
"""A context that gives the forwards of a layer, by its number. The layer has its dense weights, and
gets them back afterwards."""


class CandidateEvaluator:
    """Passes candidates through the layers together, and compares their outputs.

    Args:
        outer: embedding and head of the model, with the windows for the measurement.
        progress: receives the layers, in steps of size 0.
        opened: gives the versions of a layer; None where all are the dense one.
        reference: of the dense model, on the same windows, if `outer` are those of another model.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        progress: Progress,
        opened: Opened | None = None,
        reference: CandidateEvaluator | None = None,
    ) -> None:
        self.outer, self.progress = outer, progress
        self.opened = opened or self._unchanged
        self.reference = reference or self
        self.dense: list[Tensor] = []

    @torch.no_grad()
    def fitness(self, candidates: Sequence[Versions], rows: Sequence[int]) -> list[float]:
        """Mean KL(dense ‖ candidate) of the next token's probabilities, in nats per token.

        Args:
            candidates: the candidates.
            rows: numbers of the windows to measure on.
        """
        self.reference.pass_dense()
        sums = dict.fromkeys(candidates, 0.0)
        for part in self.outer.parts(rows, 2 * len(sums)):  # states before and after a layer
            hidden = self.last_hidden(list(sums), part)
            with self.outside():
                for place, row in enumerate(part):
                    measure = self.measure(row)
                    # one dense distribution at a time, against all candidates
                    for candidate, states in hidden.items():
                        sums[candidate] += measure(self.logits(row, states[place]))
        return [sums[candidate] / len(rows) for candidate in candidates]

    def pass_dense(self) -> None:
        """Pass the dense model through the layers, unless it has been."""
        if self.dense:
            return
        dense = (DENSE,) * len(self.outer.target.layers)
        for part in self.outer.parts(range(len(self.outer.windows)), 2):
            self.dense += self.last_hidden([dense], part)[dense]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """A context in which everything outside the layers has its weights, for `measure`."""
        with ExitStack() as stack:
            if self.reference is not self:
                stack.enter_context(self.reference.outer.outside())
            stack.enter_context(self.outer.outside())
            yield

    def measure(self, row: int) -> Callable[[Tensor], float]:
        """A function from a candidate's logits for one window to its mean over tokens."""
        reference = self.reference
        divergence = divergence_from(reference.logits(row, reference.dense[row]))
        return lambda logits: divergence(logits) / len(logits)

    def _unchanged(self, number: int, layer: nn.Module) -> AbstractContextManager[ForwardOf]:
        return nullcontext(lambda version: partial(self.outer.run, number, layer))

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """The logits of the last layer's output for one window."""
        with self.outer.matmuls():
            return self.outer.head(row, hidden)

    def last_hidden(
        self, candidates: Sequence[Versions], rows: Sequence[int]
    ) -> Mapping[Versions, list[Tensor]]:
        """The last layer's outputs of each candidate for some windows."""
        target = self.outer.target
        states: dict[Versions, list[Tensor]] = {(): self.outer.embedded(rows)}
        for number in range(len(target.layers)):
            # candidates that are equal up to here share one state
            reached = list(dict.fromkeys(c[: number + 1] for c in candidates))
            following = {v: states[v[:-1]] for v in reached if v[-1] == LEFT_OUT}
            if len(following) < len(reached):
                # A layer that no candidate keeps is not read.
                with target.layer(number) as layer, self.opened(number, layer) as forward_of:
                    for versions in reached:
                        if versions not in following:
                            forward = forward_of(versions[-1])
                            following[versions] = [forward(x) for x in states[versions[:-1]]]
            states = following
            self.progress.step(0, note=f"{len(reached)} candidates in layer {number}")
        return states


class FitnessCache:
    """The fitness of candidates, from the file of measured values or else from the model.

    Args:
        evaluator: measures candidates that are not in the file.
        versions: returns a candidate's version of each layer.
        units: names of the units of candidates.
        tokens: number of tokens in the last stage.
        file: file of the values; None keeps them in memory only.
        outer: the model with all windows that values depend on, if `evaluator` has fewer.
        conditions: what else affects the values.

    Raises:
        RecipeError: the file has other conditions.
    """

    def __init__(
        self,
        evaluator: CandidateEvaluator,
        versions: Callable[[Candidate], Versions],
        units: Sequence[str],
        tokens: int,
        file: Path | None,
        outer: EmbeddingAndHead | None = None,
        **conditions: Any,
    ) -> None:
        self.evaluator, self.versions = evaluator, versions
        self.ledger = Ledger(file)
        outer = outer or evaluator.outer
        fingerprint = {
            "windows": _checksum(outer.windows),
            "judged_tokens": tokens,
            "embedded": _checksum(outer.embedded([0])[0]),
            "units": list(units),
            **conditions,
        }
        self.values: dict[tuple[Candidate, tuple[int, ...]], float] = {}
        self.notes: dict[str, Any] = {}
        if self.ledger.begun:
            self.ledger.resume()
        if not self.ledger.entries:
            self.ledger.begin()
            self.ledger.append({"fingerprint": fingerprint})
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
        total, length = self.evaluator.outer.windows.shape
        count = min(max(1, tokens // length), total)
        first = 0 if count == total else draw * count  # the last stage is the same in every draw
        rows = tuple((first + i) % total for i in range(count))
        new = [c for c in dict.fromkeys(candidates) if (c, rows) not in self.values]
        if new:
            found = self.evaluator.fitness([self.versions(c) for c in new], rows)
            self.values |= {(c, rows): value for c, value in zip(new, found, strict=True)}
            self.ledger.append({"windows": rows, "candidates": new, "values": found})
        return [self.values[candidate, rows] for candidate in candidates]


def cut_windows(windows: Tensor, tokens: int) -> Tensor:
    """Windows of at most 512 tokens, about `tokens` in all, spread over the calibration."""
    length = min(windows.shape[1], WINDOW_TOKENS, tokens)
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    count = min(max(1, tokens // length), len(pieces))
    return pieces[torch.arange(count) * len(pieces) // count]  # evenly, the first one included


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of the bytes of a tensor, in hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{crc32(data.numpy().tobytes()):08x}"


_ROWS = 64


def divergence_from(logits: Tensor) -> Callable[[Tensor], float]:
    """What measures candidates against a dense model's logits for one window.

        Σ over tokens of KL(p ‖ softmax(z)) = Σ p · log p + logsumexp(z) − p · z, in nats

    In this form a candidate costs one pass of exponentials. It handles a few rows at a time, which
    stay in the cache. That is five times as fast as two log-softmaxes.

    Args:
        logits: of the dense model [tokens, vocabulary].

    Returns:
        A function from the logits z of a candidate to its divergence.
    """
    logits = logits.float()
    # log_softmax adds up rough sums: Σ p = 1 + 1e-5, which takes 2e-4 nats off a divergence
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    probabilities = log_probabilities.exp()
    negative_entropy = log_probabilities.mul_(probabilities).sum(-1)  # [tokens]

    def divergence(candidate: Tensor) -> float:
        total = 0.0
        parts = (probabilities, negative_entropy, candidate)
        for p, entropy, z in zip(*(x.split(_ROWS) for x in parts), strict=True):
            z = z.float()
            each = entropy + z.logsumexp(-1) - (p * z).sum(-1)
            total += float(each.sum(dtype=torch.float64))
        return total

    return divergence
