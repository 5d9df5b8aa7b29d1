"""Make the charts of a report from its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from secateur.report_page.records import ReportedRun
from secateur.reporting.charts import Bar, BarChart, Chart, HeatMap, LineChart, Series
from secateur.reporting.sweep import CurvePoint, curve_charts
from secateur.reporting.tables import bare_name, binary_size
from secateur.runs.records import LinearRecord

ALIKE = 0.005
"""Sparsities that differ by at most this count as equal."""


def shared_charts(runs: Sequence[ReportedRun]) -> Iterator[Chart]:
    """The charts with more than one model: perplexity, drift and size."""
    sweeps = [(run.name, run.sweep) for run in runs if run.sweep]
    points = [
        point
        for name, sweep in sweeps
        for point in sweep.curve_points(name if len(sweeps) > 1 else "")
    ]
    yield from curve_charts([*points, *(point for run in runs for point in _points_of(run))])
    yield from _drift(runs)
    yield from _sizes(runs)


def own_charts(run: ReportedRun) -> Iterator[Chart]:
    """The charts of one run: its frontier, its matrices, its speed and memory."""
    if run.fit is not None:
        yield replace(run.fit.chart(), key=f"frontier-{run.name}")
    yield from _heat_maps(run)
    timed = [one for one in run.bench.contenders if one.tokens_per_second] if run.bench else []
    if len(timed) < 2:
        return
    speeds = (
        Bar(x.contender, x.tokens_per_second or 0, f"{x.tokens_per_second:.1f}",
            x.contender.startswith("packed"), x.tokens_per_second_least, x.tokens_per_second_most)
        for x in timed
    )  # fmt: skip
    memory = (
        Bar(x.contender, x.resident_bytes, binary_size(x.resident_bytes),
            x.contender.startswith("packed"))
        for x in timed if x.resident_bytes
    )  # fmt: skip
    note = "Longer is better; lines from least to most."
    yield BarChart(f"speed-{run.name}", "Tokens per second", tuple(speeds), note)
    note = "Shorter is better. Of the process with the model, over that of the libraries alone."
    yield BarChart(f"memory-{run.name}", "Memory", tuple(memory), note)


def _points_of(run: ReportedRun) -> Iterator[CurvePoint]:
    """The perplexities of a run as points."""
    if run.manifest is None or run.evaluation is None:
        return
    for found in run.evaluation.perplexity:
        of = found.inherited_from
        yield CurvePoint(
            model=run.manifest.source.name,
            text=found.text,
            protocol=found.protocol,
            series=run.name if of is None else f"{run.name} (measured on {bare_name(of)})",
            sparsity=run.manifest.lost,
            cut=run.manifest.structure is not None,
            perplexity=found.perplexity,
            dense=found.reference_perplexity,
            joined=False,
        )


def _heat_maps(run: ReportedRun) -> Iterator[HeatMap]:
    """The sparsity of each matrix, unless all are equal, and the error of its output."""
    zeros = _cells(run, lambda x: x.zeros / math.prod(x.shape) if math.prod(x.shape) else None)
    found = [value for row in zeros.values() for value in row if value is not None]
    columns = tuple(layer.layer for layer in run.layers)
    if found and max(found) - min(found) > ALIKE:
        yield HeatMap(
            f"sparsity-{run.name}", "Fraction of zeros in each matrix",
            _short_names(zeros), columns, tuple(zeros.values()),
        )  # fmt: skip
    errors = _cells(run, lambda x: x.error if x.error and math.isfinite(x.error) else None)
    if any(value for row in errors.values() for value in row):
        yield HeatMap(
            f"error-{run.name}", "Error of each matrix",
            _short_names(errors), columns, tuple(errors.values()), log=True,
            note="Relative squared error of its output on the calibration data.",
        )  # fmt: skip


Cells = dict[str, tuple[float | None, ...]]


def _cells(run: ReportedRun, value: Callable[[LinearRecord], float | None]) -> Cells:
    """One value of every matrix: by name within its layer, a value for each layer."""
    # `model.layers.3.mlp.up_proj` of layer 3 is `mlp.up_proj`
    layers = [
        {x.name.partition(f".{layer.layer}.")[2] or x.name: value(x) for x in layer.linears}
        for layer in run.layers
    ]
    return {name: tuple(own.get(name) for own in layers) for name in dict.fromkeys(
        name for own in layers for name in own)}  # fmt: skip


def _short_names(cells: Cells) -> tuple[str, ...]:
    """The last parts of the names; the whole name if two would be equal."""
    last = [name.rpartition(".")[2] for name in cells]
    return tuple(x if last.count(x) == 1 else name for x, name in zip(last, cells, strict=True))


def _drift(runs: Sequence[ReportedRun]) -> Iterator[LineChart]:
    """The distance of the hidden states from the dense model's after each layer."""
    # a layer that was not compared has no error
    series = [
        Series(run.name, tuple(
            (state.layer, state.relative_error)
            for state in run.diagnosis.layers if state.relative_error is not None
        ))
        for run in runs if run.diagnosis
    ]  # fmt: skip
    if any(len(one.points) > 1 for one in series):
        yield LineChart(
            key="drift",
            title="Distance from the dense model, layer by layer",
            x_label="layer",
            y_label="relative error of its output",
            series=tuple(one for one in series if one.points),
            note="By secateur diagnose: norm of the difference over the norm of the dense output.",
        )


def _sizes(runs: Sequence[ReportedRun]) -> Iterator[BarChart]:
    """The size of the weight files beside the uncut dense model in bfloat16, int8 and int4."""
    dense: dict[str, int] = {}
    for run in runs:
        sizes = run.compression.dense_file_bytes if run.compression else {}
        found = {"bfloat16": run.dense_bytes, "int8": sizes.get("int8"), "int4": sizes.get("int4")}
        dense |= {f"dense {x}, {binary_size(n)}": n for x, n in found.items() if n}
    # runs of one model share its dense bars; two models of other sizes have their own
    bars = [Bar(name.partition(",")[0], n, binary_size(n)) for name, n in dense.items()]
    own = {run.name: run.file_bytes for run in runs}
    bars += [Bar(name, n, binary_size(n), ours=True) for name, n in own.items() if n]
    if bars:
        note = "Shorter is better. Dense int8 and int4 store the zeros."
        yield BarChart("size", "Size of the weight files", tuple(bars), note)
