"""The loop of a pruning run over the decoder layers of a model.

    first inputs ─► for each decoder layer: read ─► prune ─► (tune) ─► next inputs ─► write, ledger

A run has tasks (`tasks.py`: the sparsity of each linear) and settings (how the work is done).
Magnitude needs no calibration, and statistics of a backward through the dense model are gathered
before the run (`stream/layerwise.py`). All else is gathered while calibration tokens pass through
the layer (`stream/calibration_stream.py`). With reconstruction, the dense model's hidden states
pass as well: a pruned layer is tuned to the outputs of the dense layer before its own outputs are
passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence

import torch

from secateur.engine.prune.checks import check_zeros, collapsed
from secateur.engine.prune.coverage import coverage, warn_of_experts
from secateur.engine.prune.layer import OpenLayer, arrivals_of, prune_layer
from secateur.engine.prune.tasks import Settings, Tasks, gathering, left_dense
from secateur.engine.stream.calibration_stream import CalibrationStream, OpenStream
from secateur.engine.stream.calls import kind_of
from secateur.engine.stream.halted_forwards import put_together
from secateur.errors import VerificationError
from secateur.machine import full_float32, reused_pages
from secateur.models.targets import Target, walk_layers
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.runs.records import Layer, LinearRecord

log = logging.getLogger(__name__)


@torch.no_grad()
@full_float32()
def prune_layers(
    target: Target,
    tasks: Tasks,
    stream: CalibrationStream | None,
    settings: Settings,
    ledger: Ledger,
    progress: Progress,
    done: int = 0,
) -> Tasks:
    """Prune every decoder layer from number `done` on.

    Args:
        target: the model.
        tasks: the task of each linear.
        stream: the calibration stream; None without calibration.
        settings: how the work is done.
        ledger: record of finished layers.
        progress: receives every step.
        done: number of layers that an earlier run finished.

    Returns:
        The tasks, without linears that calibration did not reach.
    """
    count, opened = len(target.layers), None
    put_together(target.model, settings.experts_at_once)
    forwards = gathering(tasks, asymmetric=settings.asymmetric).forward or settings.tunes
    if stream is not None and forwards and done < count:
        opened = stream.open(done, dense=settings.dense_needed, rarely=True)
        done = opened.start
        ledger.back_to(done)
    for entry in ledger.layers:
        tasks = left_dense(tasks, entry.unseen)
    kinds = set[Hashable]()
    progress.start("pruning", _steps(settings, opened) * (count - done))
    with reused_pages():
        started = time.perf_counter()  # before the layer is read
        for index, module in walk_layers(target, range(done, count)):
            layer = OpenLayer(module, index, target, tasks, settings, opened, progress)
            for linear in layer.linears.values():
                if not linear.weight.any():
                    log.warning("%s is all zero before it is pruned", linear.name)
            if layer.sources and settings.asymmetric:
                from secateur.engine.prune.dense_twin import DenseTwin

                arrivals = DenseTwin(layer).arrivals()
            else:
                arrivals = arrivals_of(layer)
            records = prune_layer(layer, arrivals)
            tuned = _tuned(layer)
            tasks = left_dense(tasks, layer.unseen)
            if (kind := kind_of(module)) not in kinds:
                check_zeros(module, layer.linears.values(), tasks)
                kinds.add(kind)
            target.commit(index, _changed(layer, records, tuned=bool(tuned)), layer.blocks)
            finish_layer(layer, records, tuned, started, ledger)
            started = time.perf_counter()
    progress.finish()
    found = coverage(ledger.layers, target.architecture)
    if found is not None and settings.ranks.first:
        warn_of_experts(found)
    return tasks


def _steps(settings: Settings, opened: OpenStream | None) -> int:
    """Progress steps in one layer: the forwards of micro-batches, or 1 without any."""
    if opened is None:
        return 1
    passes = 1 if settings.sequential == "group" else 2
    passes += settings.dense_needed
    if settings.tunes:
        passes += 2 + settings.tune_passes
    return passes * len(opened.batches())


def _tuned(layer: OpenLayer) -> dict[str, float]:
    """Tune a pruned layer if the settings say so, and pass its outputs on. Return its errors."""
    pruned = [x for x in layer.pruned if x.name not in layer.unseen]
    if layer.tuning is None:
        return {}
    if pruned:
        return layer.tuning.execute(pruned, layer.blocks, stores=not layer.last)
    if not layer.last:
        layer.inputs().pass_through(layer.module)
    return {}


def _changed(layer: OpenLayer, records: Sequence[LinearRecord], *, tuned: bool) -> list[str]:
    """The full names of the parameters of a layer that have new values."""
    if tuned:
        return [f"{layer.name}.{parameter}" for parameter, _ in layer.module.named_parameters()]
    biased = {x.name for x in layer.linears.values() if x.has_bias}
    names = [record.name for record in records]
    shifted = [name for name in names if layer.tasks[name].method.solver.shifts and name in biased]
    return [*(f"{name}.weight" for name in names), *(f"{name}.bias" for name in shifted)]


def finish_layer(
    layer: OpenLayer,
    records: Sequence[LinearRecord],
    tuned: dict[str, float],
    started: float,
    ledger: Ledger,
) -> None:
    """Record a layer in the ledger when all its files are safe on disk.

    Args:
        layer: the layer, pruned.
        records: of its linears.
        tuned: the errors before and after tuning.
        started: start time of the work on it, by `time.perf_counter`.
        ledger: receives the record.

    Raises:
        VerificationError: the layer has collapsed, and the settings say to stop.
    """
    opened, settings, index = layer.opened, layer.settings, layer.index
    if opened is not None and not layer.last:
        opened.advance(index + 1)
    settings.ranks.wait()  # all have stored their inputs of the next layer
    seconds = time.perf_counter() - started
    lost = collapsed(records, layer.tasks)
    more = {"reconstruction": tuned, "collapsed": lost, "unseen": tuple(layer.unseen)}
    given = {name: value for name, value in more.items() if value}
    ledger.finish_layer(Layer(layer=index, seconds=seconds, linears=records, **given))
    settings.ranks.wait()  # the ledger of the first process has its line
    if opened is not None:
        opened.forget_before(index + 1)
    # The last layer's forwards end early, because nothing reads their outputs.
    layer.progress.step(_steps(settings, opened) - layer.steps_taken, note=f"layer {index}")
    what = ", ".join(f"{name} lost {share:.1%} of its output" for name, share in lost.items())
    if lost and settings.on_collapse == "stop":
        raise VerificationError(
            f"the layer has collapsed: {what}",
            where=layer.name,
            remedy="start anew with --restart and a lower --sparsity, or less for this layer "
            f"(--overrides '{layer.name}.*=0.3'); the finished layers were kept, and --resume "
            "with --on-collapse warn goes on with the same sparsity",
        )
    if lost and settings.ranks.first:
        log.warning("%s has collapsed: %s", layer.name, what)
