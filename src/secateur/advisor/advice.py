"""Compares the ways on one device and decides: leave the model, quantize, prune, both, or distil.

A way is *safe* if even its lowest published accuracy keeps the bound, *possible* if its highest
does. Among the safe ones the one that takes the device least time for a token wins; if several take
the same, the one that changes least. Possible ones that take less are named: measure their loss.

    busy      = prompt(P) + N · step(b) / b        device seconds of a request, P tokens in, N out
    P50       = prompt(P) + N · step(b)            seconds until it is answered, without waiting
    tokens    = price of an hour · busy / 3600 / (P + N) · 1,000,000           USD of a million
    prune     = seconds of a 7B model · parameters / 7 billion     ALPS, the longest of the one-shot
                methods, for each step; one pass without a text (FP8, Q8_0): magnitude pruning
    learn     = (6 · student + 2 · teacher) · tokens / (peak · e)  operations of a training step

The batch b is the power of two with the least busy time whose memory fits and whose step keeps the
bound, unless it is given.

    weights   = linears · bits / 8 + ends · head_bits / 8 + other · 2

`secateur.models.shape` adds the cache and the working memory. A token and a prompt take the time
that kernels were measured to take, or that of the roofline of a data sheet (Williams et al., CACM
2009), for a batch of b sequences with T tokens of context:

    bytes(b)  = weights that are read · bits / 8 + b · cache that is read
    step(b)   = max(bytes / (bandwidth · e_b), operations / (peak · e_c)) + layers · overhead
    prompt(P) = operations of a prompt / (peak · e_c), but never less than a step

Of a mixture with E experts and k for each token, b tokens read E · (1 − (1 − k / E)^b) experts of a
layer, if the router spreads them evenly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
from pydantic import InstanceOf
from pydantic_core import to_jsonable_python

from secateur.advisor.facts import THIS_MACHINE, Efficiency, Estimate, Facts, Hardware, read_facts
from secateur.advisor.options import CompressionWay, options_for
from secateur.errors import RecipeError, SourceError
from secateur.models.configuration import trusted_folder
from secateur.models.hub import download_model, hub_name, kind_of_name
from secateur.models.shape import ModelShape, ServingMemory, memory_with
from secateur.progress import Progress
from secateur.recipes.measure import AdviseRecipe
from secateur.recipes.verbs import imported
from secateur.registry import did_you_mean
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.tables import Block

GIB = 2**30
BATCHES = tuple(2**n for n in range(10))

PRUNING_DEVICE = "a100-80gb"
"""On it the times of methods were published."""

LEAST_SAVING = 0.05
"""A change that saves less than this part of the time is not worth its risk."""


def weights_read(model: ModelShape, batch: int) -> float:
    """Weights of the linears that a step reads: of a mixture, the experts that are hit."""
    if not model.experts:
        return model.linears
    dense = model.linears - model.expert_weights
    # k / E: the share of the experts that one token reads
    share = (model.active - dense) / model.expert_weights
    return dense + model.expert_weights * (1 - (1 - share) ** batch)


@dataclass(frozen=True)
class Roofline:
    """Times from a data sheet.

    Attributes:
        device: its bandwidth and peak.
        efficiency: what engines reach of them.
    """

    device: Hardware
    efficiency: Efficiency

    def step(self, model: ModelShape, way: CompressionWay, batch: int, context: int) -> Estimate:
        """Seconds until every sequence of a batch has one more token.

        Args:
            model: already cut.
            way: how it is stored.
            batch: sequences.
            context: tokens of each so far.
        """
        measured = way.zeros.decode  # where there is no published gain, the bytes decide
        gains = measured or Estimate(1.0, 1.0, 1.0)
        bits = way.values.bits if measured else way.bits
        linears = weights_read(model, batch) * bits / 8
        rest = model.head * way.head_bits(model) / 8 + batch * model.cache_read_bytes(context)
        computing = self.computing(way, batch * model.step_operations(context))
        # from quick to slow: the largest gain goes with the quickest engine
        reached, bandwidth = self.efficiency.from_quick_to_slow(), self.device.bandwidth_gb_s or 0
        return Estimate(*(
            max((linears / gain + rest) / (bandwidth * 1e9 * share), seconds)
            + overhead * model.layers
            for (share, _, overhead), gain, seconds in zip(
                reached, reversed(gains), computing, strict=True
            )
        ))  # fmt: skip

    def prompt(self, model: ModelShape, way: CompressionWay, tokens: int) -> Estimate:
        """Seconds to process a prompt: all tokens at once, but never faster than one step."""
        computing = self.computing(way, model.prompt_operations(tokens))
        return Estimate(*map(max, computing, self.step(model, way, 1, 0)))

    def computing(self, way: CompressionWay, operations: float) -> Iterator[float]:
        """Seconds for floating-point or integer operations, from quick to slow."""
        peak = self.device.tflops.get(way.values.product, self.device.tflops["bf16"]) * 1e12
        reached = self.efficiency.from_quick_to_slow()
        return (operations / (peak * share) for _, share, _ in reached)


@dataclass(frozen=True)
class Measured:
    """Times of models with random weights that were decoded on this machine.

    Attributes:
        model: the sizes that were timed.
        times: of each way to store it, by `CompressionWay.stored`: seconds of a token outside the
            decoder layers, of one in them, and of one of a prompt.
        spread: how far off a prediction may be, as a fraction.
    """

    model: ModelShape
    times: Mapping[str, tuple[float, float, float]]
    spread: float = 0.15

    def step(self, model: ModelShape, way: CompressionWay, batch: int, context: int) -> Estimate:
        """Sequences decode one after the other; a cut model's layers take as much less time."""
        ends, layers, _ = self.times[way.stored]
        return self.around(batch * (ends + layers * model.active / self.model.active))

    def prompt(self, model: ModelShape, way: CompressionWay, tokens: int) -> Estimate:
        """Every token takes the same time."""
        return self.around(tokens * self.times[way.stored][2] * model.active / self.model.active)

    def around(self, seconds: float) -> Estimate:
        """A range around a measured time."""
        return Estimate(seconds * (1 - self.spread), seconds, seconds * (1 + self.spread))


def weight_bytes(model: ModelShape, way: CompressionWay) -> int:
    """Bytes of the weights of a model that was already cut.

    The embedding is stored once; a tied head shares it.
    """
    linears = model.linears * way.bits / 8
    return round(linears + model.outer * way.head_bits(model) / 8 + model.other * 2)


@dataclass(frozen=True)
class AdviceQuestion:
    """Everything that an advice depends on.

    Attributes:
        model: the sizes, not cut.
        hardware: what it runs on.
        memory_bytes: of the device.
        facts: efficiency, prices, published losses.
        speed: predicts times.
        prompt_tokens: of a request.
        new_tokens: of its answer.
        batch: sequences at once; None for as many as pay.
        token_ms: the most milliseconds between two tokens of an answer; None for any.
        quality_loss: the fraction of the accuracy that may go.
        gpu_hours: the most for making the model.
    """

    model: ModelShape
    hardware: Hardware
    memory_bytes: int
    facts: Facts
    speed: Roofline | Measured
    prompt_tokens: int
    new_tokens: int
    batch: int | None = None
    token_ms: float | None = None
    quality_loss: float = 0.01
    gpu_hours: float = 24.0

    @property
    def context(self) -> int:
        """Tokens of a request and its answer."""
        return self.prompt_tokens + self.new_tokens

    @property
    def batches(self) -> Sequence[int]:
        """The batches to try, the smallest first; our kernels decode one sequence at a time."""
        if self.batch is not None:
            return (self.batch,)
        return BATCHES[:1] if self.hardware.kind == "cpu" else BATCHES


@dataclass(frozen=True)
class Served:
    """One way at work on the device.

    Attributes:
        batch: sequences at once.
        memory: of all of them.
        step: seconds of a step: of one token of each sequence.
        first_token: seconds to process a prompt.
        request: seconds of a whole request, without waiting: the median, P50.
        busy: seconds of the device for one request.
        usd: for a million tokens of prompt and answer; None where no price is known.
    """

    batch: int
    memory: ServingMemory
    step: Estimate
    first_token: Estimate
    request: Estimate
    busy: Estimate
    usd: Estimate | None


def served(asked: AdviceQuestion, way: CompressionWay) -> Served | str:
    """How a way works on the device, or why it cannot."""
    shape, kind = way.shape(asked.model), asked.hardware.kind
    context, weights = asked.context, weight_bytes(shape, way)
    memory = {b: memory_with(weights, shape, kind, b, context) for b in asked.batches}
    fits = [b for b, found in memory.items() if found.total <= asked.memory_bytes]
    if not fits:
        least = memory[asked.batches[0]].total / GIB
        return f"needs {least:.1f} GiB, {asked.memory_bytes / GIB:.1f} GiB are there"
    steps = {b: asked.speed.step(shape, way, b, context) for b in fits}
    quick = [b for b in fits if asked.token_ms is None or 1e3 * steps[b].typical <= asked.token_ms]
    if not quick:
        return f"{1e3 * steps[fits[0]].typical:.3g} ms for a token, {asked.token_ms:g} allowed"
    first, price = asked.speed.prompt(shape, way, asked.prompt_tokens), asked.hardware.usd_per_hour

    def busy(batch: int) -> Estimate:
        pairs = zip(first, steps[batch], strict=True)
        return Estimate(*(prompt + asked.new_tokens * step / batch for prompt, step in pairs))

    best = min(quick, key=lambda b: busy(b).typical)
    # a request waits for whole steps; the device shares each among the batch
    request = (p + asked.new_tokens * s for p, s in zip(first, steps[best], strict=True))
    usd = None
    if price is not None:
        hours = (seconds / 3600 for seconds in busy(best))
        usd = Estimate(*(1e6 / context * a * b for a, b in zip(price, hours, strict=True)))
    return Served(best, memory[best], steps[best], first, Estimate(*request), busy(best), usd)


def making_of(
    model: ModelShape, way: CompressionWay, facts: Facts
) -> tuple[Estimate, Estimate, str]:
    """What it takes to make a way: pruning or cutting, rounding, distillation.

    Returns:
        Hours of the device that the formula names, USD at its typical price, and the formula.
    """
    device, steps = facts.hardware[PRUNING_DEVICE], [part.takes for part in way.changes]
    seconds = sum(facts.pruning_seconds_of_7b[step] for step in steps) * model.parameters / 7e9
    names = " and ".join(name if n == 1 else f"{n} x {name}" for name, n in Counter(steps).items())
    formula = f"as long as pruning with {names} on one {device.name}, by published times"
    # forward and backward of the student take 6 operations a weight, the teacher's forward 2
    operations, tokens = 6 * way.shape(model).per_token + 2 * model.per_token, way.structure.tokens
    learning = (
        operations * tokens / (device.tflops["bf16"] * 1e12 * share)
        for share in reversed(facts.training_compute)
    )
    hours = Estimate(*((seconds + more) / 3600 for more in learning))
    if tokens:
        formula += f"; distillation on {tokens / 1e9:g} billion tokens"
    price = device.usd_per_hour[1] if device.usd_per_hour else 0.0
    usd = Estimate(*(price * each for each in hours))
    return hours, usd, formula if steps else "nothing to make"


@dataclass(frozen=True)
class Considered:
    """One way, computed.

    Attributes:
        option: the way.
        kept: the fraction of the accuracy that stays, published: low, high.
        served: how it works on the device; None if it cannot.
        gpu_hours: to make it, of the device that `formula` names.
        usd: to make it, at the typical price of that device.
        formula: how the hours were found.
        refused: why it is out: accuracy, hours, memory or time; empty if it is in.
        safe: whether even the lowest published accuracy keeps the bound.
    """

    option: CompressionWay
    kept: tuple[float, float]
    served: Served | None
    gpu_hours: Estimate
    usd: Estimate
    formula: str
    refused: str
    safe: bool

    @property
    def seconds(self) -> float:
        """Device seconds of a request, typical; infinite if it cannot be served."""
        return self.served.busy.typical if self.served else float("inf")


def advise_on(
    asked: AdviceQuestion,
) -> tuple[tuple[Considered, ...], Considered | None, tuple[Considered, ...]]:
    """Compute every way and decide: the quickest safe one, or the model if it is hardly slower.

    Returns:
        All ways, the quickest first and those that are out last; the one to take, None if none can
        be taken; and those that take less time and may keep the bound: measure them.
    """
    ways = (_considered(asked, option) for option in options_for(asked.model, asked.hardware))
    # the quickest first, then the least changed, then what surely keeps more
    rows = sorted(
        ways, key=lambda x: (bool(x.refused), x.seconds, len(x.option.changes), -x.kept[0])
    )
    inside = [row for row in rows if not row.refused]
    safe = [row for row in inside if row.safe]
    whole = next((row for row in safe if not row.option.changes), None)
    chosen = safe[0] if safe else None
    if chosen and whole and chosen.seconds > (1 - LEAST_SAVING) * whole.seconds:
        chosen = whole
    most = chosen.seconds if chosen else float("inf")
    cheaper = tuple(row for row in inside if not row.safe and row.seconds < most)
    return tuple(rows), chosen, cheaper


def _considered(asked: AdviceQuestion, option: CompressionWay) -> Considered:
    """Compute one way."""
    kept, made = option.kept(asked.facts), making_of(asked.model, option, asked.facts)
    found, floor, refused = served(asked, option), 1 - asked.quality_loss, ""
    if isinstance(found, str):
        refused = found
    elif kept[1] < floor:
        refused = f"keeps {kept[0]:.1%} to {kept[1]:.1%} of the accuracy, {floor:.1%} required"
    elif (hours := made[0].typical) > asked.gpu_hours:
        refused = f"takes {hours:,.0f} GPU hours to make, {asked.gpu_hours:g} allowed"
    works = None if isinstance(found, str) else found
    return Considered(option, kept, works, *made, refused, kept[0] >= floor)


# -- the verb ------------------------------------------------------------------------------------

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
    model = build_skeleton(trusted_folder(folder, trusted), alone=True)
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
        may = "would be quicker and may meet your limits: measure its loss."
        hint = f" {self.cheaper[0].option.name} {may}" if self.cheaper else ""
        if self.chosen is None:
            return f"No way is certain to keep your limits on this device.{hint}"
        option = self.chosen.option
        if not option.changes:
            said = "Leave the model as it is: nothing quicker is certain to meet your limits."
            return said + hint
        if option.changes == [option.values]:
            return f"Only quantize: {option.name}.{hint}"
        verb = "Distill" if option.structure.tokens else "Prune"
        verb += " and quantize" if option.values.takes else ""
        return f"{verb}: {option.name}.{hint}"

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
