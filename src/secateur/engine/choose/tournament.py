"""What a candidate allocation is worth, measured on the whole model with one layer in memory.

All candidates of a stage pass the layers in lock-step: a layer is read once, each candidate's
hidden states pass through it with the candidate's levels, and candidates whose levels so far are
the same share the work. Of the dense model the last hidden states are kept, not the logits: its
logits are made again for one window at a time, for all candidates together, which is one more
output head in a stage and needs no disk. Candidates only have to be ranked, so that rough matmuls
will do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from secateur.engine.choose.survey import Survey
from secateur.engine.stream.calls import first_inputs, layer_calls, replaced_layers
from secateur.engine.stream.gradients import injected
from secateur.models.architecture import Linear, linears_of
from secateur.precision import fast_matmuls
from secateur.runs.atomic import write_json
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.allocation.search import Candidate, Ladder, Search, Standing, climb

__all__ = ["WINDOW_TOKENS", "Judge", "search_levels"]

WINDOW_TOKENS = 512
"""Tokens that pass through the output head at once: its logits are the largest tensors here."""

_KL_ROWS = 64


@torch.no_grad()
def search_levels(
    survey: Survey, search: Search, grains: Mapping[str, Granularity], files: list[Path]
) -> tuple[dict[str, float], Standing]:
    """Search the levels of all competing linears.

    Args:
        survey: the look at the dense model, whose calibration tokens are used.
        search: the parameters.
        grains: of the linears that compete.
        files: for each layer, the weights of its linears at each level, from `Search.look`.

    Returns:
        The sparsity of every linear, and what the search found.
    """
    rungs = search.ladders(grains)
    informed = search.informed(stored_errors(files), rungs)
    reached = survey.work / "search.json"
    begun = None
    if reached.exists():
        stored = json.loads(reached.read_text())
        begun = Standing(**{**stored, "best": tuple(stored["best"])})
    left = search.generations - (begun.generation if begun else 0)
    evaluations = 1 + (begun is None) + left * len(search.stages)
    survey.progress.start("allocation: search", evaluations * len(files))
    judge = Judge(survey, rungs, files, search.judged_tokens)
    standing = begun
    for standing in climb(search, list(rungs.values()), informed, judge.fitness, begun):
        write_json(reached, asdict(standing))
    survey.progress.finish()
    assert standing is not None
    levels = zip(rungs.items(), standing.best, strict=True)
    return {name: ladder.sparsity(level) for (name, ladder), level in levels}, standing


def stored_errors(files: list[Path]) -> dict[str, float]:
    """The error of every linear at its target, without reading the weights beside it."""
    errors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith("/error"):
                    errors[key.removesuffix("/error")] = float(file.get_tensor(key))
    return errors


class Judge:
    """Measures candidates by mean KL(dense ‖ candidate) of their next-token probabilities.

    Args:
        survey: the look at the dense model, whose calibration tokens are used.
        rungs: the levels of each competing linear, in the order of the layers.
        files: for each layer, the weights of its linears at each level.
        tokens: how many tokens the fullest judgement sees; they are cut from calibration windows
            spread over the whole calibration.
    """

    def __init__(
        self, survey: Survey, rungs: Mapping[str, Ladder], files: list[Path], tokens: int
    ) -> None:
        assert survey.passage is not None
        self.survey, self.target, self.files = survey, survey.target, files
        self.place = {name: index for index, name in enumerate(rungs)}
        self.windows = cut(survey.passage.windows, tokens)
        with self.target.outside():
            ids = [window[None].to(self.target.device) for window in self.windows]
            calls = layer_calls(self.target.model, self.target.layers, ids[:2])
            self.first = [first_inputs(self.target.model, self.target.layers, x) for x in ids]
        self.calls = [call.to(self.target.device) for call in calls]
        rows = range(len(self.windows))
        self.dense = self.last_hidden([None], rows)[None]

    @torch.no_grad()
    def fitness(self, candidates: Sequence[Candidate], tokens: int, draw: int) -> list[float]:
        """The mean divergence of each candidate, in nats per token.

        Args:
            candidates: levels of the competing linears.
            tokens: how many tokens to judge by; all, or a part that `draw` chooses.
            draw: which part.
        """
        total, length = self.windows.shape
        count = min(max(1, tokens // length), total)
        first = 0 if count == total else draw * count
        rows = [(first + i) % total for i in range(count)]
        hidden = self.last_hidden(candidates, rows)
        sums = dict.fromkeys(hidden, 0.0)
        with self.target.outside():
            for place, row in enumerate(rows):
                dense = DenseLogits.of(self.logits(row, self.dense[row]))
                for candidate, states in hidden.items():
                    sums[candidate] += dense.divergence(self.logits(row, states[place]))
        return [sums[candidate] / (count * length) for candidate in candidates]

    @torch.no_grad()
    def last_hidden(
        self, candidates: Sequence[Candidate | None], rows: Sequence[int]
    ) -> dict[Candidate | None, list[Tensor]]:
        """The last layer's outputs for some windows, of each candidate; None is the dense model."""
        states: dict[Candidate | None, list[Tensor]] = {
            candidate if candidate is None else (): [self.first[row] for row in rows]
            for candidate in candidates
        }
        reached = 0
        for index in range(len(self.files)):
            name = self.target.architecture.layer_name(index)
            with self.target.layer(index) as layer, safe_open(self.files[index], "pt") as file:
                linears = {x.name: x for x in linears_of(layer, name).values()}
                stop = reached + sum(linear in self.place for linear in linears)
                following: dict[Candidate | None, list[Tensor]] = {}
                for candidate in candidates:
                    before = candidate if candidate is None else candidate[:reached]
                    after = candidate if candidate is None else candidate[:stop]
                    if after not in following:
                        weights = self.weights(linears, after, file)
                        following[after] = [
                            self.call(index, layer, weights, x) for x in states[before]
                        ]
            states, reached = following, stop
            self.survey.progress.step(note=f"layer {index}")
        return states

    def weights(
        self, linears: Mapping[str, Linear], candidate: Candidate | None, file: Any
    ) -> dict[str, Tensor]:
        """The weights of a layer's linears under a candidate; none for the dense model."""
        if candidate is None:
            return {}
        found = {}
        for name, linear in linears.items():
            if self.survey.tasks[name].sparsity > 0:
                level = candidate[self.place[name]] if name in self.place else 0
                weight = file.get_tensor(f"{name}/{level}").to(self.target.device)
                found[name] = weight.t() if linear.transposed else weight
        return found

    def call(
        self, index: int, layer: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor
    ) -> Tensor:
        """Run a layer with other weights; its own stay as they are."""
        prefix = self.target.architecture.layer_name(index) + "."
        instead = {f"{n.removeprefix(prefix)}.weight": w for n, w in weights.items()}
        call = self.calls[index]
        with fast_matmuls(self.target.device):
            out = functional_call(layer, instead, (hidden, *call.args), call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """What the model makes of the last layer's output: logits [sequence, vocabulary]."""
        model, layers = self.target.model, self.target.layers
        ids = self.windows[row : row + 1].to(self.target.device)
        stand_ins = injected(layers, self.calls, hidden)
        with replaced_layers(layers, stand_ins), fast_matmuls(self.target.device):
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found[0]


def cut(windows: Tensor, tokens: int) -> Tensor:
    """Windows of at most 512 tokens, about `tokens` in all, spread over the calibration."""
    length = min(windows.shape[1], WINDOW_TOKENS, tokens)
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    count = min(max(1, tokens // length), len(pieces))
    return pieces[torch.arange(count) * len(pieces) // count]


@dataclass(frozen=True)
class DenseLogits:
    """What the dense model predicts for one window, against which candidates are held.

    Attributes:
        probabilities: p, float32 [tokens, vocabulary].
        negative_entropy: Σ p · log p of each token, float32 [tokens].
    """

    probabilities: Tensor
    negative_entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> DenseLogits:
        """From logits [tokens, vocabulary]."""
        log_probabilities = logits.float().log_softmax(-1)
        probabilities = log_probabilities.exp()
        return cls(probabilities, log_probabilities.mul_(probabilities).sum(-1))

    def divergence(self, logits: Tensor) -> float:
        """Σ over tokens of KL(p ‖ softmax(z)) = Σ p · log p + logsumexp(z) − p · z.

        In this form a candidate costs one pass of exponentials, a few rows at a time so that they
        stay in the cache: five times as fast as from two log-softmaxes.
        """
        total = 0.0
        parts = (self.probabilities, self.negative_entropy, logits)
        for p, negative_entropy, z in zip(*(x.split(_KL_ROWS) for x in parts), strict=True):
            z = z.float()
            each = negative_entropy + z.logsumexp(-1) - (p * z).sum(-1)
            total += float(each.sum(dtype=torch.float64))
        return total
