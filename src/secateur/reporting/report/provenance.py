"""What a result depends on: source, method, calibration, versions, hardware, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.publishing.secrets import without_folders
from secateur.reporting.front_matter import shown_place
from secateur.reporting.report.records import (
    ReportedAdvice,
    ReportedFit,
    ReportedRun,
    ReportedSweep,
)
from secateur.reporting.tables import by_layer
from secateur.reporting.wording import binary_size, percent
from secateur.runs.records.run import Manifest

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Part:
    """The provenance of one run or sweep: tables of facts under headings, and a recipe."""

    name: str
    tables: list[tuple[str, Facts]]
    recipe: str = ""


def of_run(run: ReportedRun) -> Part:
    """Everything that a run and its measurements depend on."""
    m = run.manifest
    result: dict[str, Any] = {
        "zeros in the decoder's matrices": percent(m.result.decoder_sparsity, 2),
        "zeros in all parameters": percent(m.result.model_sparsity, 2),
        "parameters": f"{m.result.parameters:,}",
    }
    if m.structure is not None:
        result["parameters before"] = f"{m.structure.before.parameters:,}"
        result["decoder cut out"] = percent(m.structure.decoder_removed, 2)
    cost: dict[str, Any] = {
        "time": f"{m.cost.seconds:.1f} s" + (", resumed" if m.cost.resumed else ""),
        "peak memory": binary_size(m.cost.peak_resident_bytes),
    }
    if "peak_bytes" in m.plan:
        cost["planned memory"] = binary_size(m.plan["peak_bytes"])
    tables = [
        ("Source", facts({"folder": run.place, **m.source.model_dump(), "family": m.family})),
        ("Method", facts({**m.method, "allocation": m.allocation})),
        ("Calibration", facts(m.calibration or {"text": "none needed"})),
        ("Result", facts(result)),
        ("Not pruned", [(x.names, f"{x.reason}, {x.weights:,} weights") for x in m.left]),
        ("Reached by calibration", facts(reached(m))),
        ("Cost", facts(cost)),
        ("Pruned with", facts(m.environment)),
    ]
    tables += judged_with(run)
    if run.bench:
        tables.append(("Timed with", facts(differing(run.bench.protocol, m.environment))))
    if run.compression:
        formats = ", ".join(run.compression.formats)
        tables.append(("Stored as", facts({"formats": formats})))
    return Part(run.name, [table for table in tables if table[1]], without_folders(run.recipe))


def reached(manifest: Manifest) -> dict[str, Any]:
    """How many matrices calibration reached, and the experts that no token reached."""
    reach, silent = manifest.reach, (manifest.experts or {}).get("silent", {})
    found = {}
    if reach.get("fewest_tokens") is not None:
        found["matrices"] = f"{reach['pruned']:,} of {reach['matrices']:,}"
        found["fewest tokens of one"] = f"{reach['fewest_tokens']:,}"
    return found | ({"experts without tokens": by_layer(silent)} if silent else {})


def judged_with(run: ReportedRun) -> list[tuple[str, Facts]]:
    """Everything that an evaluation depends on: one table for each set of conditions."""
    tables: list[tuple[str, Facts]] = []
    for result in run.evaluation.results if run.evaluation else ():
        held = {"reference": result.reference, "measured on": result.inherited_from}
        table = facts({**held, **differing(result.environment, run.manifest.environment)})
        if ("Judged with", table) not in tables:
            tables.append(("Judged with", table))
    return tables


def of_sweep(sweep: ReportedSweep) -> Part:
    """Everything that the points of a sweep share."""
    result = sweep.result
    tables = [
        ("Conditions", facts(result.sweep.conditions)),
        ("Calibration", facts(result.sweep.calibration or {"text": "none needed"})),
        *((f"Perplexity on {text}", facts(result.sweep.protocol[text])) for text in result.texts),
        ("Made with", facts(result.sweep.environment)),
    ]
    return Part(sweep.name, tables)


def of_fit(fit: ReportedFit) -> Part:
    """The bounds of a fit, its levels, and how the winner is stored."""
    result = fit.result
    bounds: dict[str, Any] = {"folder": shown_place(fit.folder)}
    bounds |= {one.flag: one.in_words(one.wanted) for one in result.checks}
    stored = {name: f"{one.matrices} matrices" for name, one in result.packed.formats.items()}
    tables = [
        ("Bounds", facts(bounds)),
        (
            "Levels",
            facts({"levels": [one.name for one in result.singles], "seconds": result.seconds}),
        ),
        ("Stored as", facts(stored)),
    ]
    return Part(fit.name, [table for table in tables if table[1]])


def of_advice(advice: ReportedAdvice) -> Part:
    """What an advice counts with: the model, the device, prices and losses with their sources."""
    result = advice.result
    question, known = result.question, result.facts
    sizes = asdict(question.model)
    del sizes["kinds"]
    model = {name: value for name, value in sizes.items() if value}
    model["attention"] = result.cache_in_words()
    device = question.hardware.model_dump(mode="json")
    losses = {name: f"keeps {loss.kept[0]:.1%} to {loss.kept[1]:.1%}; {loss.source}"
              for name, loss in known.compressions.items()}  # fmt: skip
    prices = {name: f"{api.input:g} and {api.output:g} USD a million; {api.source}"
              for name, api in known.apis.items()}  # fmt: skip
    pruning = {name: f"{seconds:g} s" for name, seconds in known.pruning_seconds_of_7b.items()}
    return Part(
        advice.name,
        [
            ("Model", facts(model)),
            ("Device", facts({**device, "times": result.speed_basis})),
            (
                "Facts",
                facts(
                    {
                        "collected": known.date,
                        **known.efficiency[question.hardware.kind].model_dump(),
                    }
                ),
            ),
            ("Accuracy kept, published", facts(losses)),
            ("Hosted models: prompt and answer", facts(prices)),
            ("Pruning 7 B on one A100", facts(pruning)),
        ],
    )


def differing(values: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from those already shown."""
    own = {key: value for key, value in values.items() if told.get(key) != value}
    return own if len(own) == len(values) else {**own, "all else": "as pruned"}


def facts(values: Mapping[str, Any]) -> Facts:
    """Names and values for people. Empty values are left out, sections are flattened."""
    return list(flattened(values))


def flattened(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Each value with its full name, including its section."""
    for key, value in values.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{name}: ")
        elif value is not None and value != "":
            yield name, told(value)


def told(value: Any) -> str:
    """A value as text for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else without_folders(str(value))
