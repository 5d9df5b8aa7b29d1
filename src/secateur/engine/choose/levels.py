"""The search over levels of sparsity (`sparsity.allocation.search`), measured on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from secateur.engine.choose.survey import Survey
from secateur.engine.choose.tournament import (
    Lockstep,
    Tournament,
    Version,
    Versions,
    cut_windows,
    fingerprint,
)
from secateur.engine.stream.ends import ModelEnds
from secateur.models.architecture import linears_of
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.allocation.search import LevelSearch
from secateur.sparsity.evolution import Candidate

__all__ = ["FoundLevels", "LevelVariants", "search_levels"]


@dataclass(frozen=True)
class FoundLevels:
    """The result of a search.

    Attributes:
        sparsity_of: the sparsity of every linear.
        divergence: divergence of the best candidate, in nats per token, on the tokens of the last
            stage.
        uniform_divergence: divergence of uniform sparsity, on the same tokens.
    """

    sparsity_of: dict[str, float]
    divergence: float
    uniform_divergence: float


@torch.no_grad()
def search_levels(
    survey: Survey, search: LevelSearch, grains: Mapping[str, Granularity], files: Sequence[Path]
) -> FoundLevels:
    """Search the levels of all competing linears.

    Args:
        survey: gives the model, the calibration tokens, and the folder for `search.jsonl`.
        search: the parameters.
        grains: grains of the competing linears.
        files: for each layer, the weights of its linears at each level, from `LevelSearch.look`.
    """
    assert survey.passage is not None
    rungs = search.ladders(grains)
    tokens = search.judged_tokens
    ends = ModelEnds(survey.target, cut_windows(survey.passage.windows, tokens))
    fixed = {n for n, task in survey.tasks.items() if task.sparsity > 0 and n not in rungs}
    variants = LevelVariants(ends, list(rungs), fixed, files)
    tournament = Tournament(
        Lockstep(ends, variants, "divergence", survey.progress),
        variants.versions,
        survey.work / "search.jsonl",
        fingerprint(ends, tokens, "divergence", list(rungs)),
    )
    survey.progress.start("allocation: search", search.generations + 1)
    informed = search.informed(stored_errors(files), rungs)
    for leader in search.climb(list(rungs.values()), informed, tournament):
        found = leader
        survey.progress.step()
    survey.progress.finish()
    (uniform,) = tournament([(0,) * len(rungs)], tokens, 0)
    levels = zip(rungs.items(), found.candidate, strict=True)
    sparsity_of = {name: ladder.sparsity(level) for (name, ladder), level in levels}
    return FoundLevels(sparsity_of, found.fitness, uniform)


def stored_errors(files: Sequence[Path]) -> dict[str, float]:
    """The error of every linear at its target, without reading the weights in the same file."""
    errors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith("/error"):
                    errors[key.removesuffix("/error")] = float(file.get_tensor(key))
    return errors


class LevelVariants:
    """Decoder layers whose linears have the weights of given levels.

    The version of a layer is a tuple with the level of each of its competing linears. In the dense
    model it is `dense`.

    Args:
        ends: ends of the model.
        competing: names of the competing linears; a candidate has a level for each.
        fixed: linears with their own sparsity.
        files: for each layer, the weights of its linears at each level.
    """

    dense: Version = "dense"

    def __init__(
        self, ends: ModelEnds, competing: Sequence[str], fixed: set[str], files: Sequence[Path]
    ) -> None:
        self.ends, self.fixed, self.files = ends, fixed, files
        architecture = ends.target.architecture
        prefixes = [architecture.layer_name(i) + "." for i in range(len(files))]
        self.by_layer = [[n for n in competing if n.startswith(prefix)] for prefix in prefixes]
        place = {name: index for index, name in enumerate(competing)}
        self.places = [[place[name] for name in names] for names in self.by_layer]

    def versions(self, candidate: Candidate) -> Versions:
        """The levels of a candidate, layer by layer."""
        return tuple(tuple(candidate[i] for i in places) for places in self.places)

    @contextmanager
    def opened(
        self, number: int, layer: nn.Module
    ) -> Iterator[Callable[[Version], Callable[[Tensor], Tensor]]]:
        """The forward of each version. Making a forward reads its weights from the file."""
        with safe_open(self.files[number], "pt") as file:

            def forward_of(version: Version) -> Callable[[Tensor], Tensor]:
                weights = self.weights(number, layer, version, file)

                def replaced(*args: Any, **kwargs: Any) -> Any:
                    return functional_call(layer, weights, args, kwargs)

                return lambda hidden: self.ends.run(number, replaced, hidden)

            yield forward_of

    def weights(
        self, number: int, layer: nn.Module, version: Version, file: Any
    ) -> dict[str, Tensor]:
        """The weights of a version by their names in the layer; empty for the dense model."""
        if not isinstance(version, tuple):
            return {}
        target, found = self.ends.target, {}
        levels = dict(zip(self.by_layer[number], version, strict=True))
        prefix = target.architecture.layer_name(number)
        for name, linear in linears_of(layer, prefix).items():
            if linear.name in levels or linear.name in self.fixed:
                key = f"{linear.name}/{levels.get(linear.name, 0)}"
                weight = file.get_tensor(key).to(target.device)
                found[f"{name}.weight"] = weight.t() if linear.transposed else weight
        return found
