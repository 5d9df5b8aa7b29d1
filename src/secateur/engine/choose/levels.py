"""The search over levels of sparsity (`sparsity.allocation.search`), measured on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.engine.choose.survey import Survey
from secateur.engine.choose.tournament import (
    Lockstep,
    Tournament,
    cut_windows,
    fingerprint,
)
from secateur.engine.choose.weight_variants import WeightVariants
from secateur.engine.stream.ends import ModelEnds
from secateur.models.architecture import Linear
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.allocation.search import LevelSearch


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


class LevelVariants(WeightVariants):
    """Decoder layers at levels of sparsity.

    Args:
        ends: ends of the model.
        competing: names of the competing linears; a candidate has a level for each.
        fixed: linears with their own sparsity.
        files: for each layer, the weights of its linears at each level.
    """

    def __init__(
        self, ends: ModelEnds, competing: Sequence[str], fixed: set[str], files: Sequence[Path]
    ) -> None:
        super().__init__(ends, competing)
        self.fixed, self.files = fixed, files

    def source(self, number: int) -> AbstractContextManager[Any]:
        """The file of the layer."""
        return cast(AbstractContextManager[Any], safe_open(self.files[number], "pt"))

    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight at a level; a linear with its own sparsity has only one."""
        if level is None and linear.name not in self.fixed:
            return None
        weight: Tensor = source.get_tensor(f"{linear.name}/{level or 0}")
        weight = weight.to(self.ends.target.device)
        return weight.t() if linear.transposed else weight
