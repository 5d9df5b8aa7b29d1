"""Advises on a model without running it: prune, quantize, both, distil, or leave it.

A well-known shape is answered without torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import psutil
from pydantic import InstanceOf
from pydantic_core import to_jsonable_python

from secateur.advisor.advice import (
    GIB,
    AdviceQuestion,
    Considered,
    Measured,
    Roofline,
    advise_on,
    verdict_on,
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
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.tables import Block

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
        from secateur.evaluation.token_times import time_tokens
        from secateur.runtime.formats import WeightFormat

        formats = {
            way.stored: WeightFormat(way.values.name, way.zeros.sparsity)
            for way in options_for(shape, hardware)
        }
        timed, day = time_tokens(config, list(formats.values()), progress)
        speed = Measured(shape, {name: timed[one] for name, one in formats.items()})
        basis = f"measured here: decoded with random weights, {day}"
    asked = recipe.model_dump(include={*ASKED})
    question = AdviceQuestion(shape, hardware, round(memory), facts, speed, **asked)
    return AdviseResult.of(question, recipe.model, device, basis)


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


class AdviseResult(Result):
    """The advice, with every number behind it.

    Attributes:
        model: what the user named.
        hardware: its name in the facts.
        question: everything that the advice depends on.
        speed_basis: how times were found.
        considered: all ways, the quickest first; those that are out come last.
        chosen: the way to take; None if none can be taken.
        cheaper: ways that take less time and may keep the bound: measure them.
    """

    model: str
    hardware: str
    question: InstanceOf[AdviceQuestion]
    speed_basis: str
    considered: tuple[InstanceOf[Considered], ...]
    chosen: InstanceOf[Considered] | None
    cheaper: tuple[InstanceOf[Considered], ...]

    @classmethod
    def of(
        cls, question: AdviceQuestion, model: str, hardware: str, speed_basis: str
    ) -> AdviseResult:
        """Answer a question."""
        considered, chosen, cheaper = advise_on(question)
        return cls(
            model=model, hardware=hardware, question=question, speed_basis=speed_basis,
            considered=considered, chosen=chosen, cheaper=cheaper,
        )  # fmt: skip

    @property
    def verdict(self) -> str:
        """What to do, in one or two sentences."""
        return verdict_on(self.chosen, self.cheaper)

    @property
    def commands(self) -> list[str]:
        """The commands that make the chosen way; none if nothing is to be done."""
        return self.chosen.option.commands(self.model) if self.chosen else []

    @property
    def exit_code(self) -> int:
        """3 if no way keeps the bounds for certain."""
        return 0 if self.chosen else 3

    def to_json(self) -> dict[str, Any]:
        """All ways with their numbers, each as [low, typical, high], and where they are from."""
        asked = self.question
        record = {
            "schema": "secateur.advice/2",
            "model": self.model,
            "parameters": asked.model.parameters,
            "hardware": self.hardware,
            **{name: getattr(asked, name) for name in ASKED},
            "verdict": self.verdict,
            "chosen": self.chosen and self.chosen.option.name,
            "commands": self.commands,
            "measure_first": [row.option.name for row in self.cheaper],
            "options": [
                {
                    "option": row.option.name,
                    "kept": row.kept,
                    "served": row.served,
                    "making": {x: getattr(row, x) for x in ("gpu_hours", "usd", "formula")},
                    "refused": row.refused,
                    "safe": row.safe,
                    "bits": row.option.bits,
                    "sources": row.option.sources(asked.facts),
                    "commands": row.option.commands(self.model),
                }
                for row in self.considered
            ],
            "basis": {
                "times": self.speed_basis,
                "memory": "estimated: secateur/models/shape.py",
                "prices": asked.hardware.price_source,
                "facts_date": asked.facts.date.isoformat(),
            },
        }
        return cast("dict[str, Any]", to_jsonable_python(record))

    def tables(self) -> list[Block]:
        """The verdict, the ways, how to make the chosen one, and where the numbers are from."""
        rows, chosen = [self.row(one) for one in self.shown()], self.chosen
        making = chosen if self.commands else None
        return blocks_of(
            "AdviseResult",
            self,
            rows=rows,
            billions=self.question.model.parameters / 1e9,
            star="*" if rows else None,
            plain=[x for x in self.considered if x.refused and len(x.option.changes) <= 1],
            recipe=making and "recipe:",
            hours=making and _ranged(making.gpu_hours),
            usd=making and _ranged(making.usd),
            origins=self.origins(),
        )

    def shown(self) -> list[Considered]:
        """The quickest ways that are in, the advised one and the model as it is among them."""
        inside = [row for row in self.considered if not row.refused]
        kept = [row for row in inside if row is self.chosen or not row.option.changes]
        first = [row for row in inside if row not in kept][: SHOWN - len(kept)]
        return [row for row in inside if row in kept or row in first]

    def row(self, row: Considered) -> dict[str, Any]:
        """The cells of a way, and its style."""
        low, high = row.kept
        # no break between the mark and the name
        mark = "*\u00a0" if row is self.chosen else "" if row.safe else "?\u00a0"
        return {
            "name": mark + row.option.name,
            "accuracy": f"{low:.0%}" if low == high else f"{100 * low:.3g}-{100 * high:.3g}%",
            "found": row.served,
            "style": "bold green" if row is self.chosen else "" if row.safe else "yellow",
        }

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
        asked, chosen = self.question, self.chosen
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


def _ranged(value: Estimate) -> str:
    """A number with its range."""
    low, typical, high = (f"{x:,.0f}" if value.typical >= 10 else f"{x:.2g}" for x in value)
    return typical if low == high else f"{typical} ({low} to {high})"
