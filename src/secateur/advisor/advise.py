"""Advises on a model without running it: prune, quantize, both, distil, or leave it.

An answer takes well under a second: torch and transformers are imported only where this machine
is timed, or where transformers has to say the sizes of a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
from pydantic_core import to_jsonable_python

from secateur.advisor.advice import Advice, AdviceQuestion, Considered, Requirements, nearest
from secateur.advisor.capacity import GIB, Capacity, Load, TokenTimes
from secateur.advisor.facts import (
    ESTIMATED,
    GIVEN,
    MEASURED,
    PUBLISHED,
    THIS_MACHINE,
    Estimate,
    Facts,
    Hardware,
    read_facts,
)
from secateur.advisor.options import options_for
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.hub import download_model, hub_name, kind_of_name
from secateur.models.shape import ModelShape
from secateur.progress import Progress
from secateur.recipes.measure import AdviseRecipe
from secateur.recipes.verbs import imported
from secateur.registry import did_you_mean
from secateur.reporting.tables import Block, Line, Result, Table
from secateur.runs.output import check_writable

FREE_SHARE = 0.8
"""The fraction of this machine's memory that a model may take."""


def advise_recipe(recipe: AdviseRecipe, progress: Progress) -> AdviseResult:
    """Say what would make a model cheaper to serve, and what that would cost.

    Reads the configuration, no weights. Numbers are measured on this machine, published, or
    estimated by a formula, and say which.
    """
    page = None if recipe.html is None else Path(recipe.html)
    if page is not None:
        check_writable(page, file=True)
    facts = read_facts(None if recipe.facts is None else Path(recipe.facts))
    device = facts.known_name(recipe.hardware)
    hardware = facts.hardware[device]
    if recipe.spot:
        if hardware.spot_usd_per_hour is None:
            known = (n for n, one in facts.hardware.items() if one.spot_usd_per_hour)
            raise RecipeError(
                f"nobody publishes a spot price of {hardware.name}",
                where="--spot",
                remedy=f"known are those of {', '.join(known)}; or give yours with --usd-per-hour",
            )
        facts = facts.at_spot_prices()
        hardware = facts.hardware[device]
    if recipe.usd_per_hour is not None:
        price = (recipe.usd_per_hour,) * 3
        given = {"usd_per_hour": price, "price_source": GIVEN}
        hardware = hardware.model_copy(update=given)
    shape, config = _shape_of(recipe, device, facts, progress)
    times, basis = None, f"roofline of the data sheet; {facts.efficiency[hardware.kind].source}"
    if device == THIS_MACHINE:
        times, basis = _times_here(recipe, facts, hardware, shape, config, progress)
    memory = hardware.memory_gib
    total = psutil.virtual_memory().total * FREE_SHARE if memory is None else memory * 2**30
    new_tokens = recipe.answer_tokens()
    load = Load(
        recipe.requests_per_day,
        recipe.tokens_per_request - new_tokens,
        new_tokens,
        recipe.peak,
        recipe.utilisation,
        recipe.latency_p99_ms,
        recipe.first_token_ms,
    )
    need = Requirements(load, recipe.quality_loss, recipe.gpu_hours)
    question = AdviceQuestion(shape, hardware, round(total), facts, need, times)
    answer = question.answer()
    result = AdviseResult(recipe.model, device, question, answer, basis, page)
    if page is not None:
        write = imported("secateur.report_page.report:write_advice")
        write(f"{recipe.model} on {hardware.name}", result, page)
    return result


def _times_here(
    recipe: AdviseRecipe,
    facts: Facts,
    hardware: Hardware,
    shape: ModelShape,
    config: Any,
    progress: Progress,
) -> tuple[dict[str, TokenTimes], str]:
    """Times of every storage of the model on this machine, and how they were found."""
    if config is None:
        raise RecipeError(
            f"{recipe.model} is a well-known shape, and this machine can be timed only with the "
            "configuration of a model",
            where="--hardware",
            remedy=f"name a folder with config.json, or other hardware: "
            f"{', '.join(n for n in facts.hardware if n != THIS_MACHINE)}",
        )
    from secateur.evaluation.random_models import WeightFormat
    from secateur.evaluation.token_times import time_tokens

    storages = {
        option.stored: WeightFormat(option.values.name, option.zeros.sparsity)
        for option in options_for(shape, hardware)
    }
    timed, day = time_tokens(config, list(storages.values()), progress)
    times = {stored: TokenTimes(*timed[storage]) for stored, storage in storages.items()}
    return times, f"decoded on this machine with random weights, {day}"


def _shape_of(
    recipe: AdviseRecipe, device: str, facts: Facts, progress: Progress
) -> tuple[ModelShape, Any]:
    """The sizes of the model, and its configuration; None for a well-known shape."""
    name = recipe.model
    if name in facts.shapes and kind_of_name(name) is None:
        return facts.shapes[name].shape(name), None
    if kind_of_name(name) is None:
        raise SourceError(
            f"{name!r} is no folder, no hub id (org/name), no sample and no well-known shape",
            where="MODEL",
            remedy=f"check the path; or a shape: {did_you_mean(name.lower(), [*facts.shapes])}",
        )
    from secateur.models.counting import counted
    from secateur.models.skeleton import build_skeleton, gguf_skeleton

    if kind_of_name(name) == "file" and name.endswith(".gguf"):
        model = gguf_skeleton(Path(name).expanduser())
        return counted(name, model), model.config
    trusted, hub = recipe.trust_remote_code, hub_name(name)
    if kind_of_name(name) == "hub" and hub is not None:
        folder = download_model(hub.repo, hub.revision, trusted, weights=False)
    elif kind_of_name(name) == "folder" or Path(name).name == "config.json":
        folder = Path(name).expanduser()
        folder = folder if folder.is_dir() else folder.parent
    else:
        resolve = imported("secateur.models.sources:resolve")
        folder = resolve(name, values=False, progress=progress).folder
    model = build_skeleton(folder, trust_remote_code=trusted, alone=True)
    return counted(name, model), model.config


SCHEMA = "secateur.advice/1"
SHOWN = 8
"""Options in the table; --json has all."""

BESIDE = ("as it is", "int4", "q4_0", "2:4 zeros", "2:4 zeros + int4", "50% zeros + int4")
"""Options beside hosted models, whether or not they keep the bounds."""


@dataclass(frozen=True, repr=False)
class AdviseResult(Result):
    """The advice, with every number behind it.

    Attributes:
        model: what the user named.
        hardware: its name in the facts.
        question: everything that the advice depends on.
        advice: the options and the decision.
        speed_basis: how times were found.
        page: the HTML file; None if none was written.
    """

    model: str
    hardware: str
    question: AdviceQuestion
    advice: Advice
    speed_basis: str
    page: Path | None = None

    @property
    def facts(self) -> Facts:
        """What was counted with."""
        return self.question.facts

    @property
    def load(self) -> Load:
        """Requests, tokens and latencies of the service."""
        return self.question.need.load

    @property
    def nearest(self) -> tuple[str, ...]:
        """Looser bounds that can be kept; empty if these can."""
        if self.advice.chosen is not None:
            return ()
        return tuple(nearest(self.advice.considered, self.question.need))

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that make the chosen option; none if nothing is to be done."""
        chosen = self.advice.chosen
        return chosen.option.commands(self.model) if chosen else ()

    @property
    def exit_code(self) -> int:
        """3 if nothing serves the load within the bounds."""
        return 0 if self.advice.chosen else 3

    def to_json(self) -> dict[str, Any]:
        """All options with their numbers, and where each kind of number is from."""
        advice = self.advice
        record = {
            "schema": SCHEMA,
            "model": self.model,
            "parameters": advice.model.parameters,
            "hardware": self.hardware,
            "load": self.load,
            "quality_loss": self.question.need.quality_loss,
            "gpu_hours": self.question.need.gpu_hours,
            "verdict": advice.verdict,
            "filled": advice.filled,
            "hosted": advice.hosted,
            "elsewhere": advice.elsewhere,
            "chosen": advice.chosen.option.name if advice.chosen else None,
            "nearest": self.nearest,
            "commands": self.commands,
            "paid_back_months": advice.paid_back_months,
            "measure_first": [row.option.name for row in advice.cheaper],
            "options": [self.row_json(row) for row in advice.considered],
            "apis": advice.apis,
            "basis": {
                "times": self.speed_basis,
                "memory": f"{ESTIMATED}: secateur/advisor/capacity.py",
                "prices": self.price_origin(),
                "facts_date": self.facts.date.isoformat(),
            },
            "question": self.question.to_json(),
            "page": self.page,
        }
        return cast("dict[str, Any]", to_jsonable_python(record))

    @classmethod
    def read(cls, file: Path) -> AdviseResult:
        """The result in a file that `secateur advise --json` wrote. The advice is computed again.

        Raises:
            CheckpointError: the file is damaged, or of another release.
        """
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA:
                raise ValueError(f"the schema is {record['schema']!r}, not {SCHEMA!r}")
            question = AdviceQuestion.from_json(record["question"])
            basis = record["basis"]["times"]
            return cls(record["model"], record["hardware"], question, question.answer(), basis)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "this file is not what `secateur advise --json` of this release writes",
                where=str(file),
                remedy="write it again with `secateur advise MODEL --json`, or name the folder of "
                "a run",
            ) from error

    def row_json(self, row: Considered) -> dict[str, Any]:
        """The numbers of one option."""
        record: dict[str, Any] = {
            "option": row.option.name,
            "refused": row.refused,
            "safe": row.safe,
            "accuracy_kept": row.kept,
            "accuracy_sources": row.option.sources(self.facts),
            "making": row.making,
            "commands": row.option.commands(self.model),
        }
        if isinstance(row.capacity, Capacity):
            record["capacity"] = row.capacity
        return record if row.cost is None else {**record, "cost_usd": row.cost}

    def blocks(self) -> Sequence[Block]:
        """The verdict, the options, the hosted models, and where the numbers are from."""
        advice, load = self.advice, self.load
        form = ",.0f" if load.requests_per_day >= 1 else ".2g"
        rate = f"{load.requests_per_day:{form}} requests a day of {load.prompt_tokens} + "
        rate += f"{load.new_tokens} tokens"
        title = f"{self.model} ({advice.model.parameters / 1e9:.2f} B) on {advice.device.name}, "
        fit = self.shown()
        rows = [self.row(row) for row in fit]
        styles = [
            "bold green" if row is advice.chosen else "" if row.safe else "yellow" for row in fit
        ]
        columns = ("option", "accuracy", "memory", "devices", "ms/token", "USD/month")
        blocks: list[Block] = [Line(advice.verdict, "bold")]
        blocks += [Line(f"nearest: {line}") for line in self.nearest]
        if rows:
            blocks.append(Table.of(title + rate, columns, rows, styles=styles))
        blocks += [Line(line, "dim") for line in [*self.legend(), *self.refused()]]
        blocks += [*self.recipe(), *self.hosted(), *(Line(x, "dim") for x in self.origins())]
        return blocks if self.page is None else [*blocks, Line(f"page: {self.page}")]

    def shown(self) -> list[Considered]:
        """The cheapest options that are in, the advised one and the model as it is among them."""
        fit = [row for row in self.advice.considered if not row.refused]
        kept = [row for row in fit if row is self.advice.chosen or not row.option.changed]
        first = [row for row in fit if row not in kept][: SHOWN - len(kept)]
        return [row for row in fit if row in kept or row in first]

    def notes(self) -> list[str]:
        """What the numbers mean, why options are out, and where numbers are from."""
        return [*self.legend(), *self.refused(), *self.origins()]

    def row(self, row: Considered) -> tuple[str, ...]:
        """The cells of an option."""
        found, cost = row.capacity, row.cost
        assert isinstance(found, Capacity)
        assert cost is not None
        low, high = row.kept
        mark = "*\u00a0" if row is self.advice.chosen else "" if row.safe else "?\u00a0"
        return (
            mark + row.option.name,
            f"{low:.0%}" if low == high else f"{100 * low:.3g}-{100 * high:.3g}%",
            f"{found.memory.total / GIB:.3g} GiB",
            f"{found.devices.typical:.0f}",
            f"{found.step.typical * 1e3:.1f}",
            f"{cost.month.typical:,.0f}",
        )

    def legend(self) -> list[str]:
        """What the marks and columns of the table of options mean."""
        found = [row.capacity for row in self.shown()]
        sizes = sorted({one.batch for one in found if isinstance(one, Capacity)})
        if not sizes:
            return []
        batch = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return [
            "*: advised. ?: may break your limit on accuracy: measure its loss first.",
            f"Memory of a copy and ms/token at the batch size that this load needs ({batch}). "
            f"{len(self.advice.considered)} options with ranges and sources: --json",
        ]

    def refused(self) -> list[str]:
        """Why options are out, one line each for the plain ones."""
        plain = [row for row in self.advice.considered if row.refused and row.option.changed <= 1]
        return [f"{row.option.name}: {row.refused}" for row in plain]

    def recipe(self) -> list[Block]:
        """The commands of the chosen option."""
        chosen = self.advice.chosen
        if chosen is None or not self.commands:
            return []
        making = chosen.making
        quick = making.gpu_hours.typical < 1
        time = _ranged(making.gpu_hours * (60 if quick else 1), ",.2g" if quick else ",.1f")
        usd = _ranged(making.usd, ",.2f" if making.usd.typical < 10 else ",.0f")
        cost = f"{time} GPU {'minutes' if quick else 'hours'}, {usd} USD"
        lines = [Line(f"  {command}") for command in self.commands]
        lines.append(Line(f"  takes about {cost} ({making.formula})"))
        months = self.advice.paid_back_months
        if months:
            when = "within a day" if months < 1 / 30 else f"after {months:.2g} months"
            lines.append(Line(f"  paid back {when}"))
        return [Line("recipe:", "bold"), *lines]

    def hosted(self) -> list[Block]:
        """Serving it oneself beside hosted models, under the same load."""
        advice, tokens = self.advice, self.load.new_tokens
        if not advice.apis:
            return []
        rows = []
        for row in advice.considered:
            found, cost, name = row.capacity, row.cost, row.option.name
            if (row is advice.chosen or name in BESIDE) and isinstance(found, Capacity) and cost:
                low, high = row.kept
                accuracy = "100%" if low == 1 else f"{100 * low:.3g}-{100 * high:.3g}%"
                seconds, month = found.seconds(tokens).typical, f"{cost.month.typical:,.0f}"
                rows.append((name, accuracy, month, _seconds(seconds), ""))
        for api in advice.apis:
            least, time = api.requests_per_day, self.facts.apis[api.name].seconds(tokens)
            shown = "never" if least is None else f"{least:,.0f}"
            rows.append((
                f"{api.name} (API)", "", f"{api.month:,.0f}",
                "not known" if time is None else _seconds(time), shown,
            ))  # fmt: skip
        columns = ("served as", "accuracy", "USD/month", "P50, s", "own cheaper from")
        note = (
            "P50: half of the requests take at most so many seconds, waiting not counted. From so "
        )
        note += "many requests a day on, the advised option on one's own device costs less."
        return [Table.of("", columns, rows), Line(note, "dim")]

    def format_cache(self) -> str:
        """What one sequence of the load keeps, and in which layers."""
        model, tokens = self.advice.model, self.load.context
        kinds = [(kind.layers, kind.cache) for kind in model.kinds]
        counts = {
            "all tokens": sum(n for n, one in kinds if one.values and one.window is None),
            "a window": sum(n for n, one in kinds if one.values and one.window is not None),
            "a state": sum(n for n, one in kinds if one.state_bytes and not one.values),
            "nothing": sum(n for n, one in kinds if not one.values and not one.state_bytes),
        }
        layers = ", ".join(f"{count:g} keep {what}" for what, count in counts.items() if count)
        held = model.held_bytes(tokens, self.advice.device.kind) / 2**20
        return f"cache of {tokens} tokens in bfloat16: {held:,.1f} MiB ({layers})"

    def price_origin(self) -> str:
        """Where the price of the device is from."""
        source = self.advice.device.price_source
        ours = source == GIVEN or source.startswith("our estimate")
        return source if ours else f"{PUBLISHED}; {source}"

    def origins(self) -> list[str]:
        """Where each kind of number is from."""
        device, chosen = self.advice.device, self.advice.chosen
        sources = chosen.option.sources(self.facts) if chosen else ()
        times = ESTIMATED if self.question.times is None else MEASURED
        return [
            f"times: {times}; {self.speed_basis}",
            f"memory: {ESTIMATED}; formula in docs/advise.md; {self.format_cache()}",
            f"price of {device.usd_per_hour[1]:g} USD an hour ({device.usd_per_hour[0]:g} to "
            f"{device.usd_per_hour[2]:g}): {self.price_origin()}",
            *(f"accuracy: {PUBLISHED}; {source}" for source in sources),
            f"facts of {self.facts.date}; replace any with --facts FILE",
        ]


def _seconds(time: float) -> str:
    """A time with two digits."""
    return f"{time:.0f}" if time >= 100 else f"{time:.2g}"


def _ranged(value: Estimate, form: str) -> str:
    """A number with its range."""
    if value.low == value.high:
        return format(value.typical, form)
    return f"{value.typical:{form}} ({value.low:{form}} to {value.high:{form}})"
