"""The global scope: one look at the whole dense model decides how much each linear loses.

Scores of all linears compete for one budget. They are computed on the dense model and kept on
disk; two streaming passes find the exact threshold (`sparsity.allocation.global_threshold`). The
result is a number of zeros per linear; which weights those are is decided layer by layer later,
on the inputs the pruned model really sees. For scores that do not depend on inputs (magnitude,
gradient) that is exactly the mask of the global threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.engine.forwards import by_layer
from secateur.engine.run import Run
from secateur.engine.surgery import GroupStatistics, check_finite
from secateur.models.architecture import Linear, linears_of
from secateur.sparsity.allocation.global_threshold import global_threshold
from secateur.sparsity.exact_count import pruned_count

__all__ = ["share_globally"]


def share_globally(run: Run) -> None:
    """Replace the sparsities a run asks of its linears by those of one global threshold.

    Linears with a sparsity of their own, and those left out, keep it and do not compete.
    """
    assert run.settings.work is not None
    settled = run.settings.work / "global-shares.json"
    if settled.exists():
        run.sparsity_of.update(json.loads(settled.read_text()))
        return
    competing = {
        name
        for name, sparsity in run.sparsity_of.items()
        if sparsity > 0 and run.selection.override(name) is None
    }
    files = score_layers(run, competing)
    sizes = {name: score.numel() for name, score in stored_scores(files)}
    budget = pruned_count(sum(sizes.values()), run.sparsity)
    counts = global_threshold(partial(stored_scores, files), budget)
    shares = {name: count / sizes[name] for name, count in counts.items()}
    run.sparsity_of.update(shares)
    unfinished = settled.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(shares))
    unfinished.rename(settled)
    for file in files:
        file.unlink()


def stored_scores(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The scores of all linears, one layer in memory at a time."""
    for file in files:
        yield from sorted(load_file(file).items())


@torch.no_grad()
def score_layers(run: Run, competing: set[str]) -> list[Path]:
    """Score every competing linear of the dense model; one file per layer."""
    target, work = run.target, run.settings.work
    assert work is not None
    if run.input_statistics:
        run.record_calls()
        run.activations = run.open_activations()
        run.fill_first_inputs()
        run.activations.advance(0)
    run.progress.start("global scope", len(target.layers) * forwards_per_layer(run))
    files = []
    for index in range(len(target.layers)):
        file = work / f"scores-{index:04d}.safetensors"
        with target.layer(index) as layer:
            linears = linears_of(layer, target.architecture.layer_name(index))
            check_finite(list(linears.values()))
            scores = score_layer(run, index, layer, linears, competing)
        unfinished = file.with_suffix(".unfinished")
        save_file(scores, unfinished)
        unfinished.rename(file)
        files.append(file)
        if not run.input_statistics:
            run.step(index)
    run.progress.finish()
    run.activations = None
    return files


def forwards_per_layer(run: Run) -> int:
    """Steps of progress that one layer is worth."""
    return len(run.batches()) if run.input_statistics else 1


def score_layer(
    run: Run, index: int, layer: torch.nn.Module, linears: dict[str, Linear], competing: set[str]
) -> dict[str, Tensor]:
    """The pattern's units of one layer's linears, scored on dense inputs."""
    own = run.own_statistics(index)
    shared: dict[str, dict[str, Tensor]] = {}
    if run.input_statistics:
        groups = run.grouped(index, layer, linears)
        gathered = [
            GroupStatistics(run.input_statistics, group[0], run.target.device) for group in groups
        ]
        last = index == len(run.target.layers) - 1
        forwards = [run.forward(index, layer, b, write=not last) for b in run.batches()]
        by_layer(groups, forwards, lambda group, x: gathered[group].update(x))
        assert run.activations is not None
        if run.activations.held is None and not last:
            run.activations.advance(index + 1)
            run.activations.forget(index)
        for group, statistics in zip(groups, gathered, strict=True):
            value = statistics.value()
            shared.update({linear.name: value for linear in group})
    scores = {}
    for linear in linears.values():
        if linear.name in competing:
            known = {**shared.get(linear.name, {}), **own(linear)}
            score = run.method.score(linear.weight, known)
            scores[linear.name] = run.method.pattern.units(score).cpu().contiguous()
    return scores
