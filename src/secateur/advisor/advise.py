"""Advises on a model without running it: prune, quantize, both, distil, or leave it.

A well-known shape is answered without torch and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
from pydantic_core import to_jsonable_python

from secateur.advisor.advice import (
    GIB,
    Advice,
    AdviceQuestion,
    Considered,
    Measured,
    Roofline,
    advise_on,
)
from secateur.advisor.facts import THIS_MACHINE, Estimate, Facts, read_facts
from secateur.advisor.options import options_for
from secateur.errors import RecipeError, SourceError
from secateur.models.hub import download_model, hub_name, kind_of_name
from secateur.models.shape import ModelShape
from secateur.progress import Progress
from secateur.recipes.measure import AdviseRecipe
from secateur.recipes.verbs import imported
from secateur.registry import did_you_mean
from secateur.reporting.tables import Block, Line, Result, Table

FREE_SHARE = 0.8
"""The fraction of this machine's memory that a model may take."""


def advise_recipe(recipe: AdviseRecipe, progress: Progress) -> AdviseResult:
    """Say what would make a model smaller and quicker, and what that would cost.

    Reads the configuration, no weights. Numbers are measured on this machine, published, or
    estimated by a formula, and say which.
    """
    facts = read_facts(None if recipe.facts is None else Path(recipe.facts))
    device = facts.known_name(recipe.hardware)
    hardware = facts.hardware[device]
    if recipe.usd_per_hour is not None:
        given = {"usd_per_hour": (recipe.usd_per_hour,) * 3, "price_source": "given by the user"}
        hardware = hardware.model_copy(update=given)
    shape, config = _shape_of(recipe, device, facts, progress)
    efficiency = facts.efficiency[hardware.kind]
    speed: Roofline | Measured = Roofline(hardware, efficiency)
    basis = f"estimated: roofline of the data sheet; {efficiency.source}"
    memory = (hardware.memory_gib or 0) * GIB
    if device == THIS_MACHINE:
        memory = psutil.virtual_memory().total * FREE_SHARE
        if config is None:
            raise RecipeError(
                f"{recipe.model} is a well-known shape, and this machine can be timed only with "
                "the configuration of a model",
                where="--hardware",
                remedy="name a folder with config.json, or other hardware",
            )
        from secateur.evaluation.random_models import WeightFormat
        from secateur.evaluation.token_times import time_tokens

        formats = {
            way.stored: WeightFormat(way.values.name, way.zeros.sparsity)
            for way in options_for(shape, hardware)
        }
        timed, day = time_tokens(config, list(formats.values()), progress)
        speed = Measured(shape, {name: timed[one] for name, one in formats.items()})
        basis = f"measured here: decoded with random weights, {day}"
    asked = recipe.model_dump(include={*ASKED})
    question = AdviceQuestion(shape, hardware, round(memory), facts, speed, **asked)
    return AdviseResult(recipe.model, device, question, advise_on(question), basis)


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


ASKED = ("prompt_tokens", "new_tokens", "batch", "token_ms", "quality_loss", "gpu_hours")
"""The options that are fields of the question."""

SHOWN = 8
"""Ways in the table; --json has all."""


@dataclass(frozen=True, repr=False)
class AdviseResult(Result):
    """The advice, with every number behind it.

    Attributes:
        model: what the user named.
        hardware: its name in the facts.
        question: everything that the advice depends on.
        advice: the ways and the decision.
        speed_basis: how times were found.
    """

    model: str
    hardware: str
    question: AdviceQuestion
    advice: Advice
    speed_basis: str

    @property
    def commands(self) -> list[str]:
        """The commands that make the chosen way; none if nothing is to be done."""
        chosen = self.advice.chosen
        return chosen.option.commands(self.model) if chosen else []

    @property
    def exit_code(self) -> int:
        """3 if no way keeps the bounds for certain."""
        return 0 if self.advice.chosen else 3

    def to_json(self) -> dict[str, Any]:
        """All ways with their numbers, each as [low, typical, high], and where they are from."""
        asked, advice = self.question, self.advice
        record = {
            "schema": "secateur.advice/2",
            "model": self.model,
            "parameters": asked.model.parameters,
            "hardware": self.hardware,
            **{name: getattr(asked, name) for name in ASKED},
            "verdict": advice.verdict,
            "chosen": advice.chosen and advice.chosen.option.name,
            "commands": self.commands,
            "measure_first": [row.option.name for row in advice.cheaper],
            "options": [
                {
                    **vars(row),
                    "option": row.option.name,
                    "bits": row.option.bits,
                    "sources": row.option.sources(asked.facts),
                    "commands": row.option.commands(self.model),
                }
                for row in advice.considered
            ],
            "basis": {
                "times": self.speed_basis,
                "memory": "estimated: secateur/models/shape.py",
                "prices": asked.hardware.price_source,
                "facts_date": asked.facts.date.isoformat(),
            },
        }
        return cast("dict[str, Any]", to_jsonable_python(record))

    def blocks(self) -> Sequence[Block]:
        """The verdict, the ways, how to make the chosen one, and where the numbers are from."""
        advice, asked, rows = self.advice, self.question, self.shown()
        blocks: list[Block] = [Line(advice.verdict, "bold")]
        if rows:
            title = f"{self.model} ({asked.model.parameters / 1e9:.2f} B) on {asked.hardware.name}"
            title += f", requests of {asked.prompt_tokens} + {asked.new_tokens} tokens"
            columns = ("way", "accuracy", "memory", "batch", "ms/token", "P50, s", "USD/1M tokens")
            styles = [
                "bold green" if row is advice.chosen else "" if row.safe else "yellow"
                for row in rows
            ]
            cells = [self.row(row) for row in rows]
            blocks.append(Table.of(title, columns, cells, styles=styles))
            blocks.append(Line(LEGEND, "dim"))
        plain = [x for x in advice.considered if x.refused and len(x.option.changes) <= 1]
        blocks += [Line(f"{row.option.name}: {row.refused}", "dim") for row in plain]
        if advice.chosen and self.commands:
            making = advice.chosen.making
            hours = f"{_ranged(making.gpu_hours)} GPU hours, {_ranged(making.usd)}"
            blocks.append(Line("recipe:", "bold"))
            blocks += [Line(f"  {command}") for command in self.commands]
            blocks.append(Line(f"  takes about {hours} USD ({making.formula})"))
        return blocks + [Line(line, "dim") for line in self.origins()]

    def shown(self) -> list[Considered]:
        """The quickest ways that are in, the advised one and the model as it is among them."""
        inside = [row for row in self.advice.considered if not row.refused]
        kept = [row for row in inside if row is self.advice.chosen or not row.option.changes]
        first = [row for row in inside if row not in kept][: SHOWN - len(kept)]
        return [row for row in inside if row in kept or row in first]

    def row(self, row: Considered) -> tuple[str, ...]:
        """The cells of a way."""
        found, (low, high) = row.served, row.kept
        assert found is not None
        mark = "*\u00a0" if row is self.advice.chosen else "" if row.safe else "?\u00a0"
        return (
            mark + row.option.name,
            f"{low:.0%}" if low == high else f"{100 * low:.3g}-{100 * high:.3g}%",
            f"{found.memory.total / GIB:.3g} GiB",
            f"{found.batch}",
            f"{found.step.typical * 1e3:.1f}",
            f"{found.request.typical:.2g}",
            f"{found.usd.typical:.2g}" if found.usd else "",
        )

    def format_cache(self) -> str:
        """What one sequence keeps, and in which layers."""
        asked, model = self.question, self.question.model
        tokens = asked.context
        counts = {
            "all tokens": sum(n for one, n in model.caches if one.values and one.window is None),
            "a window": sum(n for one, n in model.caches if one.values and one.window is not None),
            "a state": sum(n for one, n in model.caches if one.state_bytes and not one.values),
            "nothing": sum(n for one, n in model.caches if not one.values and not one.state_bytes),
        }
        layers = ", ".join(f"{count:g} keep {what}" for what, count in counts.items() if count)
        held = model.held_bytes(tokens, asked.hardware.kind) / 2**20
        return f"cache of {tokens} tokens in bfloat16: {held:,.1f} MiB ({layers})"

    def origins(self) -> list[str]:
        """Where each kind of number is from."""
        asked, chosen = self.question, self.advice.chosen
        sources = chosen.option.sources(asked.facts) if chosen else ()
        price = "no price is published for it: --usd-per-hour gives yours"
        if asked.hardware.usd_per_hour:
            low, typical, high = asked.hardware.usd_per_hour
            price = f"{typical:g} ({low:g} to {high:g}) USD an hour; {asked.hardware.price_source}"
        return [
            f"times: {self.speed_basis}",
            f"memory: estimated; formula in docs/advise.md; {self.format_cache()}",
            f"price: {price}",
            *(f"accuracy: published; {source}" for source in sources),
            f"facts of {asked.facts.date}; replace any with --facts FILE",
        ]


LEGEND = (
    "*: advised. ?: may break your limit on accuracy: measure its loss first. Memory and ms/token "
    "at the batch that serves most; --json has all ways with ranges and sources."
)


def _ranged(value: Estimate) -> str:
    """A number with its range."""
    low, typical, high = (f"{x:,.0f}" if value.typical >= 10 else f"{x:.2g}" for x in value)
    return typical if low == high else f"{typical} ({low} to {high})"
