"""Allocation over a model: one pass through the dense model sets the sparsity of each linear.

The result is a task for each linear. The run later chooses the weights to prune, layer by layer,
on the inputs of the pruned model. For the global scope with scores that do not depend on
inputs (magnitude, gradient), the result is exactly the mask of one threshold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from secateur.calibration.statistics import Gathering
from secateur.engine.plan import PartNeeds
from secateur.engine.prune.tasks import Tasks, gathered_bytes, settled_allocation, with_sparsities
from secateur.engine.search import candidate_evaluator, sensitivity
from secateur.engine.search.survey import Survey, grains_of, uniform_if_equal
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.machine import full_float32
from secateur.models.architecture import linears_of, text_config
from secateur.models.targets import Target
from secateur.runs.output import write_json
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity, settle
from secateur.sparsity.allocation.search import LevelSearch, is_measured_alone
from secateur.sparsity.evolution import Candidate


@full_float32()
def allocate(survey: Survey, allocation: Allocation, sparsity: float) -> Tasks:
    """Return the tasks of a run with the sparsities of an allocation in place of uniform ones.

    Linears with their own sparsity keep it and do not compete. Excluded linears stay dense.

    Args:
        survey: survey of the dense model.
        allocation: sets the sparsity of each linear.
        sparsity: sparsity of the whole model.
    """
    grains = grains_of(survey.tasks, allocation)
    if allocation.reach == 0 or not grains:
        return survey.tasks
    settled, ranks = settled_allocation(survey.work), survey.settings.ranks
    if not ranks.once(settled.exists):
        alone = is_measured_alone(allocation)
        files = [] if alone else survey.execute(allocation, grains)

        def settle_all() -> None:
            found: dict[str, float] = {}
            if isinstance(allocation, LevelSearch):
                ideal, found = search_levels(survey, allocation, grains, files)
            elif alone:
                slopes = sensitivity.pruned_alone(survey, allocation, grains)
                ideal = allocation.allocate(slopes.items, grains, sparsity)
            else:
                ideal = allocation.allocate(partial(_stored, files), grains, sparsity)
            shares = settle(ideal, grains).items()
            sparsity_of = {
                name: uniform_if_equal(survey.tasks[name], share) for name, share in shares
            }
            write_json(settled, {"sparsity_of": sparsity_of, **found})
            for file in files:
                file.unlink()
            shutil.rmtree(survey.work / sensitivity.ALONE, ignore_errors=True)

        ranks.once(settle_all)
    found = ranks.once(lambda: json.loads(settled.read_text(encoding="utf-8")))
    return with_sparsities(survey.tasks, found["sparsity_of"])


def _stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The allocation's stored values of all layers, with one tensor in memory at a time."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def survey_needs(
    target: Target,
    groups: Sequence[Sequence[Sequence[tuple[int, int]]]],
    allocation: Allocation,
    prunable: int,
    windows: Tensor | None,
    of_token: int,
) -> PartNeeds:
    """The needs of an allocation besides one dense layer: statistics, scores, logits.

    Args:
        target: the model; its layers may be empty.
        groups: for each layer, the shapes of the linears that share an input.
        allocation: sets the sparsity of each linear.
        prunable: number of weights that may be pruned.
        windows: calibration tokens; None if the allocation reads only weights.
        of_token: bytes of a hidden state in float32.
    """
    item = target.dtype.itemsize
    held = allocation.working_bytes(prunable // len(target.layers), item)
    disk = allocation.disk_bytes(prunable, item)
    if windows is None:
        return PartNeeds(held, disk, allocation.tokens(0, 0))
    held += gathered_bytes(Gathering.of(allocation.requires).forward, groups)
    if allocation.judged_tokens:
        # Probabilities of the dense model, logits of a candidate, and one temporary copy; or
        # logits, their gradient, and one copy.
        tokens = min(candidate_evaluator.WINDOW_TOKENS, windows.shape[1])
        held += 3 * 4 * tokens * int(text_config(target.model.config).vocab_size)
        if is_measured_alone(allocation):  # inputs of all layers, gradients of two
            tokens = min(allocation.judged_tokens, windows.numel())
            disk += (len(target.layers) + 3) * tokens * of_token
    linears = sum(len(group) for layer in groups for group in layer)
    return PartNeeds(held, disk, allocation.tokens(windows.numel(), linears))


@torch.no_grad()
def search_levels(
    survey: Survey, search: LevelSearch, grains: Mapping[str, Granularity], files: Sequence[Path]
) -> tuple[dict[str, float], dict[str, float]]:
    """Search the levels of all competing linears.

    Returns the sparsity of every linear; and the divergence of the best candidate and of uniform
    sparsity, in nats per token, on the tokens of the last stage.

    Args:
        survey: gives the model, the calibration tokens, and the folder for `search.jsonl`.
        search: the parameters.
        grains: grains of the competing linears.
        files: for each layer, the weights of its linears at each level, from `LevelSearch.observe`.
    """
    assert survey.calibration is not None
    rungs = search.ladders(grains)
    tokens = search.judged_tokens
    windows = candidate_evaluator.cut_windows(survey.calibration.windows, tokens)
    outer = EmbeddingAndHead(survey.target, windows, fast=survey.settings.fast_matmuls)
    fixed = {n for n, task in survey.tasks.items() if task.sparsity > 0 and n not in rungs}
    variants = LevelVariants(outer, list(rungs), fixed, files)
    file = survey.work / "search.jsonl"
    evaluator = candidate_evaluator.CandidateEvaluator(outer, survey.progress, variants.opened)
    fitness = candidate_evaluator.FitnessCache(
        evaluator, variants.versions, variants.names, tokens, file
    )
    survey.progress.start("allocation: search", search.generations + 1)
    errors: dict[str, float] = {}  # at the targets, without reading the weights in the same files
    for path in files:
        with safe_open(path, "pt") as stored_layer:
            found = [key for key in stored_layer.keys() if key.endswith("/error")]  # noqa: SIM118
            names = [key.removesuffix("/error") for key in found]
            errors |= {n: float(stored_layer.get_tensor(f"{n}/error")) for n in names}
    informed = search.informed(errors, rungs)
    for leader in search.climb(list(rungs.values()), informed, fitness):
        best = leader
        survey.progress.step()
    survey.progress.finish()
    (uniform,) = fitness([(0,) * len(rungs)], tokens, 0)  # measured before, so it is in the file
    levels = zip(rungs.items(), best.candidate, strict=True)
    sparsity_of = {name: ladder.sparsity(level) for (name, ladder), level in levels}
    return sparsity_of, {"divergence": best.fitness, "uniform_divergence": uniform}


class LevelVariants:
    """Decoder layers whose linears have the weights of given levels of sparsity.

    The version of a layer is a tuple with the level of each of its competing linears. In the dense
    model it is `DENSE`.

    Args:
        outer: embedding and head of the model.
        competing: names of the competing linears; a candidate has a level for each.
        fixed: linears with their own sparsity.
        files: for each layer, the weights of its linears at each level.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        competing: Sequence[str],
        fixed: set[str],
        files: Sequence[Path],
    ) -> None:
        self.outer, self.names = outer, list(competing)
        self.fixed, self.files = fixed, files
        layer_name, count = outer.target.architecture.layer_name, len(outer.target.layers)
        prefixes = [layer_name(index) + "." for index in range(count)]
        self.places = [
            [place for place, name in enumerate(competing) if name.startswith(prefix)]
            for prefix in prefixes
        ]

    def versions(self, candidate: Candidate) -> candidate_evaluator.Versions:
        """The levels of a candidate, layer by layer."""
        return tuple(tuple(candidate[place] for place in places) for places in self.places)

    @contextmanager
    def opened(self, number: int, layer: nn.Module) -> Iterator[candidate_evaluator.ForwardOf]:
        """The forward of each version. Making a forward reads its weights."""
        prefix = self.outer.target.architecture.layer_name(number)
        linears, names = linears_of(layer, prefix), [self.names[p] for p in self.places[number]]
        with safe_open(self.files[number], "pt") as stored:

            def forward_of(version: candidate_evaluator.Version) -> Callable[[Tensor], Tensor]:
                if version == candidate_evaluator.DENSE:
                    return partial(self.outer.run, number, layer)
                level_of = dict(zip(names, cast(tuple[int, ...], version), strict=True))
                weights: dict[str, Tensor] = {}
                for name, linear in linears.items():
                    # a linear with its own sparsity is stored at level 0 alone
                    level = level_of.get(linear.name, 0 if linear.name in self.fixed else None)
                    if level is not None:
                        weight = stored.get_tensor(f"{linear.name}/{level}")
                        weight = weight.to(self.outer.target.device)
                        # as the module has it: [in, out] for Conv1D
                        weights[f"{name}.weight"] = weight.t() if linear.transposed else weight

                def replaced(*args: Any, **kwargs: Any) -> Any:
                    return functional_call(layer, weights, args, kwargs)

                return partial(self.outer.run, number, replaced)

            yield forward_of
