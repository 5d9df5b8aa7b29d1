"""What the page's script needs to compute an advice anew: the question, tables and constants.

`templates/advisor.js` has the formulas of `secateur.advisor`, and no number of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from secateur.advisor import advice, capacity
from secateur.advisor.advice import FILLED, LEAST_SAVING, LEAST_USD, AdviceQuestion
from secateur.advisor.facts import Estimate
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS
from secateur.reporting.report.records import ReportedAdvice
from secateur.reporting.tables import Table


@dataclass(frozen=True)
class Slider:
    """One slider of the what-if page.

    Attributes:
        name: of the number that it sets.
        label: for people.
        low: the least value.
        high: the largest value.
        log: whether equal steps are equal factors.
        whole: whether the value is a whole number.
        any_text: what the end that sets no value is called; empty if there is none.
        any_at: the position of that end, 0 or 400.
    """

    name: str
    label: str
    low: float
    high: float
    log: bool = True
    whole: bool = False
    any_text: str = ""
    any_at: int = 400


SLIDERS = (
    Slider("requests_per_day", "requests a day", 1, 1e9, whole=True),
    Slider("prompt_tokens", "tokens of a prompt", 1, 2**17, whole=True),
    Slider("new_tokens", "tokens of an answer", 1, 2**15, whole=True),
    Slider("quality_loss", "accuracy that may go", 0, 0.5, log=False, any_text="any"),
    Slider("token_ms", "between two tokens, 99 of 100", 1, 1e4, any_text="any"),
    Slider("usd_per_hour", "price of a device, an hour", 0.001, 100),
    Slider("devices", "devices that you have", 1, 512, whole=True, any_text="as needed", any_at=0),
    Slider("utilisation", "planned part of a device's time", 0.05, 1, log=False),
    Slider("peak", "busiest moment over average", 1, 10, log=False),
)


@dataclass(frozen=True)
class AdviceView:
    """The data of an advice for the page.

    Attributes:
        name: of the file.
        verdict: one sentence.
        tables: as the terminal shows them.
        lines: the notes, as the terminal shows them, without the verdict.
        commands: that make the chosen option.
        hardware: devices to choose from, by name.
        sliders: of the what-if page.
        data: JSON for the script.
    """

    name: str
    verdict: str
    tables: list[Table]
    lines: list[str]
    commands: tuple[str, ...]
    hardware: list[tuple[str, str]]
    sliders: tuple[Slider, ...]
    data: str


def advice_view(advice: ReportedAdvice) -> AdviceView:
    """The data of an advice for the page."""
    result = advice.result
    chosen = result.advice.chosen
    refused, origins = (
        [line.text for line in lines] for lines in (result.refused(), result.origins())
    )
    lines = [*result.legend(), *refused, *origins]
    devices = result.facts.hardware.items()
    hardware = [(key, one.name) for key, one in devices if one.on_paper or key == result.hardware]
    return AdviceView(
        advice.name,
        result.advice.verdict,
        [block for block in result.blocks() if isinstance(block, Table)],
        lines,
        chosen.option.commands(result.model) if chosen else (),
        hardware,
        SLIDERS,
        json.dumps(
            what_if_data(result.question, result.model, result.hardware)
            | {"verdict": result.advice.verdict}
        ),
    )


def what_if_data(question: AdviceQuestion, model: str, hardware: str) -> dict[str, Any]:
    """The data of the script, as JSON.

    Args:
        question: what the sliders begin with.
        model: as the commands name it.
        hardware: its name in the facts.
    """
    return {
        "name": model,
        "hardware": hardware,
        "question": question.to_json(),
        "parts": {
            "structures": [asdict(one) for one in STRUCTURES.values()],
            "zeros": [{**asdict(one), "decode": _ends(one.decode)} for one in ZEROS.values()],
            "values": [asdict(one) for one in VALUES.values()],
        },
        "constants": {
            "gib": capacity.GIB,
            "chunk_tokens": capacity.CHUNK_TOKENS,
            "fragmentation": capacity.FRAGMENTATION,
            "runtime_bytes": capacity.RUNTIME_BYTES,
            "parallel_efficiency": capacity.PARALLEL_EFFICIENCY,
            "measured_spread": capacity.Measured.spread,
            "batches": list(capacity.BATCHES),
            "shared_by": list(capacity.SHARED_BY),
            "month_hours": advice.MONTH_HOURS,
            "year_hours": advice.YEAR_HOURS,
            "month_days": advice.MONTH_DAYS,
            "pruning_device": advice.PRUNING_DEVICE,
            "pruning_method": advice.PRUNING_METHOD,
            "least_saving": LEAST_SAVING,
            "filled": FILLED,
            "least_usd": LEAST_USD,
        },
    }


def _ends(value: Estimate | None) -> list[float] | None:
    """Low, typical, high."""
    return None if value is None else [value.low, value.typical, value.high]
