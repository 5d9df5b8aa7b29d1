"""Make the charts of a report from its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from secateur.report_page.records import Records, ReportedRun
from secateur.reporting.charts import Bar, BarChart, Chart, HeatMap, LineChart, Mark, Series
from secateur.reporting.sweep import CurvePoint, curve_charts
from secateur.reporting.tables import bare_name, binary_size
from secateur.reporting.tables import percent as percent_of
from secateur.runs.records import LinearRecord

ALIKE = 0.005
"""Sparsities that differ by at most this count as equal."""


def all_figures(records: Records) -> list[Chart]:
    """All charts, in the order of the page."""
    drifts, sizes = drift(records.runs), size_chart(records.runs)
    return [
        *curves(records),
        *(chart for run in records.runs for chart in heat_maps(run)),
        *([drifts] if drifts else []),
        *([sizes] if sizes else []),
        *speed_charts(records.runs),
        *memory_charts(records.runs),
        *(fit.result.chart() for fit in records.fits),
    ]


def curves(records: Records) -> list[LineChart]:
    """Perplexity against sparsity: points of runs and lines of sweeps that can be compared."""
    several = len(records.sweeps) > 1
    points = [
        point
        for sweep in records.sweeps
        for point in sweep.result.curve_points(sweep.name if several else "")
    ]
    points += [point for run in records.runs for point in _points_of(run)]
    return curve_charts(points)


def _points_of(run: ReportedRun) -> Iterable[CurvePoint]:
    """The perplexities of a run as points."""
    for found in run.evaluation.perplexity if run.evaluation else ():
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


def heat_maps(run: ReportedRun) -> list[HeatMap]:
    """Heat maps of the sparsity of each matrix and the error of its output: layers × linears.

    If all sparsities are equal, `alike` gives a line of text instead of a heat map.
    """
    maps = []
    if run.layers and _uniform(run) is None:
        cells = _cells(run, _sparsity_of)
        note = "Fraction of zeros."
        title = "Sparsity of each matrix"
        maps.append(HeatMap(f"sparsity-{run.name}", title, *cells, percent=True, note=note))
    if any(x.error is not None for layer in run.layers for x in layer.linears):
        cells = _cells(run, lambda x: x.error)
        note = "Relative squared error of its output on the calibration data; logarithmic colours."
        title = "Error of each matrix"
        maps.append(HeatMap(f"error-{run.name}", title, *cells, log=True, note=note))
    return maps


def _sparsity_of(linear: LinearRecord) -> float | None:
    """The fraction of zeros in a matrix; None for a matrix without weights."""
    weights = linear.shape[0] * linear.shape[1]
    return linear.zeros / weights if weights else None


def _uniform(run: ReportedRun) -> float | None:
    """The sparsity of all matrices, if it is equal within half a percent; None if they differ."""
    found = [s for layer in run.layers for x in layer.linears if (s := _sparsity_of(x)) is not None]
    if not found or max(found) - min(found) > ALIKE:
        return None
    return sum(found) / len(found)


def alike(runs: Sequence[ReportedRun]) -> list[str]:
    """A line for each run without a heat map: one sparsity everywhere, or no records."""
    by_sparsity: dict[str, list[str]] = {}
    without, unmeasured = [], []
    for run in runs:
        if not run.layers:
            without.append(run.name)
            continue
        share = _uniform(run)
        if share is not None:
            by_sparsity.setdefault(percent_of(share, 1), []).append(run.name)
        if all(x.error is None for layer in run.layers for x in layer.linears):
            unmeasured.append(run.name)
    lines = [
        f"{', '.join(names)}: uniform, {share} zeros in every matrix."
        for share, names in by_sparsity.items()
    ]
    if unmeasured:
        lines.append(f"{', '.join(unmeasured)}: the method does not measure errors of matrices.")
    if without:
        lines.append(f"{', '.join(without)}: no record of layers (secateur/layers.jsonl).")
    return lines


Cells = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[float | None, ...], ...]]


def _cells(run: ReportedRun, value: Callable[[LinearRecord], float | None]) -> Cells:
    """Names of matrices, numbers of layers, and one value of every matrix."""
    cells: dict[str, dict[int, float | None]] = {}
    for layer in run.layers:
        for linear in layer.linears:
            within = linear.name.partition(f".{layer.layer}.")[2] or linear.name
            cells.setdefault(within, {})[layer.layer] = value(linear)
    columns = [layer.layer for layer in run.layers]
    values = tuple(tuple(row.get(number) for number in columns) for row in cells.values())
    last = [name.rpartition(".")[2] for name in cells]
    # the whole name if two would be equal
    rows = (x if last.count(x) == 1 else name for x, name in zip(last, cells, strict=True))
    return tuple(rows), tuple(map(str, columns)), values


def drift(runs: Sequence[ReportedRun]) -> LineChart | None:
    """The distance of the hidden states from the dense model's after each layer."""
    series = []
    for run in runs:
        layers = run.diagnosis.layers if run.diagnosis else ()
        marks = []
        for state in layers:
            if state.relative_error is not None:
                said = f"{run.name}, layer {state.layer}: relative error {state.relative_error:.3f}"
                said += "" if state.cosine is None else f", cosine {state.cosine:.4f}"
                marks.append(Mark(state.layer, state.relative_error, description=said))
        if marks:
            series.append(Series(run.name, tuple(marks)))
    if all(len(one.marks) < 2 for one in series):
        return None
    return LineChart(
        key="drift",
        title="Distance from the dense model, layer by layer",
        x_label="layer",
        y_label="relative error of its output",
        series=tuple(series),
        note="By secateur diagnose: norm of the difference over the norm of the dense output.",
    )


def size_chart(runs: Sequence[ReportedRun]) -> BarChart | None:
    """The size of the weight files next to the uncut dense model in bfloat16, int8 and int4."""
    bars: list[Bar] = []
    sizes = dict.fromkeys(_parameters_before(run) for run in runs)
    for parameters in sizes:
        own = [run for run in runs if _parameters_before(run) == parameters]
        packed = [x.compression.bfloat16_bytes for x in own if x.compression]
        dense = packed[0] if packed and not own[0].manifest.structure else 2 * parameters
        several = f", {parameters / 1e6:,.0f} M parameters" if len(sizes) > 1 else ""
        bars.append(Bar(f"dense bfloat16{several}", dense / 2**20, binary_size(dense)))
        rounded = next((x.compression.dense_file_bytes for x in own if x.compression), {})
        bars += [
            Bar(f"dense {values}{several}", rounded[values] / 2**20, binary_size(rounded[values]))
            for values in ("int8", "int4")
            if rounded and not own[0].manifest.structure
        ]
        for run in own:
            packed_as, result = run.compression, run.manifest.result
            size = packed_as.file_bytes if packed_as else result.file_bytes
            kind = ", zeros stored" if not packed_as and result.decoder_sparsity > 0 else ""
            bars.append(Bar(run.name, size / 2**20, binary_size(size) + kind, ours=True))
    if not bars:
        return None
    return BarChart(
        "size",
        "Size of the weight files",
        "MiB",
        tuple(bars),
        "Shorter is better. Dense int8 and int4 store the zeros, with the embeddings of the packed "
        "model. The command secateur compress removes the zeros from the files.",
    )


def _parameters_before(run: ReportedRun) -> int:
    """The number of parameters before any cut."""
    cut = run.manifest.structure
    return cut.before.parameters if cut else run.manifest.result.parameters


def speed_charts(runs: Sequence[ReportedRun]) -> list[BarChart]:
    """Tokens per second of each way to run a model, for each timed run."""
    charts = []
    for run in runs:
        p = run.bench.protocol if run.bench else {}
        bars = tuple(
            Bar(
                c.contender,
                c.tokens_per_second,
                f"{c.tokens_per_second:.1f} tokens/s",
                c.contender.startswith("packed"),
                c.tokens_per_second_least,
                c.tokens_per_second_most,
            )
            for c in (run.bench.contenders if run.bench else ())
            if c.tokens_per_second
        )
        note = (
            f"Longer is better; lines from least to most. Batch 1, "
            f"{p.get('prompt_tokens', '?')} tokens read, {p.get('new_tokens', '?')} written, "
            f"{p.get('rounds', '?')} rounds in turns, on {p.get('cpu', '?')}, "
            f"{p.get('threads', '?')} threads."
        )
        if len(bars) > 1:
            title = f"Speed of {run.name}"
            charts.append(BarChart(f"speed-{run.name}", title, "tokens a second", bars, note))
    return charts


def memory_charts(runs: Sequence[ReportedRun]) -> list[BarChart]:
    """Memory of each way to run a model, for each run with a measurement."""
    charts = []
    note = (
        "Shorter is better. Of the process with the model loaded, over that of the libraries alone."
    )
    for run in runs:
        bars = tuple(
            Bar(c.contender, size / 2**20, binary_size(size), c.contender.startswith("packed"))
            for c in (run.bench.contenders if run.bench else ())
            if (size := c.resident_bytes)
        )
        if len(bars) > 1:
            title = f"Memory of {run.name}"
            charts.append(BarChart(f"memory-{run.name}", title, "MiB", bars, note))
    return charts
