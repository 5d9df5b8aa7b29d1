"""What a dry run of `prune`, `structure`, `train` and `fit` returns, and what `methods` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.engine.plan_memory import PrunePlan
from secateur.reporting.models import compared
from secateur.reporting.tables import (
    Block,
    Columns,
    Line,
    Result,
    Table,
    binary_size,
    not_pruned,
    time_range,
)
from secateur.runs.records import Counts


@dataclass(frozen=True, repr=False)
class PlanResult(Result):
    """The memory, disk, work and time that a pruning run would need.

    Attributes:
        plan: sizes in bytes, and work.
        activations: where hidden states would be stored between layers: memory or disk.
        processes: how many share the work; memory and work are those of the first one.
    """

    plan: PrunePlan
    activations: str
    processes: int = 1

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory of the device that computes."""
        return self.plan.peak_bytes

    @property
    def host_peak_bytes(self) -> int:
        """Estimated peak memory of this process."""
        return self.plan.host_peak_bytes

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The shortest and the longest estimated time of the run on this machine."""
        return self.plan.seconds

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        own = {"activations": self.activations, "processes": self.processes}
        return {**self.plan.to_json(), **own}

    def blocks(self) -> Sequence[Block]:
        """One table."""
        plan = self.plan
        values = {
            "plan": plan,
            "activations": self.activations,
            "left": not_pruned(plan.left),
            "time": plan.seconds and time_range(*plan.seconds),
            "work": plan.flops / 1e12,
            "forwards": plan.sizes["forward"] + plan.sizes["waiting"],
            "solved": plan.solve_shape if plan.solve_shape[0] else None,
            "writing": plan.sizes["writing"] or None,
            "distilling": plan.sizes["distilling"] or None,
            "learning": "one layer or the head" if plan.sweep_windows else "the whole model",
            "usual": plan.peak_bytes - plan.fallback_bytes if plan.fallback_bytes else None,
            **_peaks(plan.on_gpu, plan.peak_bytes, plan.host_peak_bytes),
        }
        several = f" of one of {self.processes} processes" if self.processes > 1 else ""
        return [Table.about(f"plan{several}", PLAN + PEAKS + USUAL, values)]


PLAN = """
    decoder layers | {plan.num_hidden_layers}
    weights that can be pruned | {plan.prunable_weights:,}
    not pruned | {left}
    calibration tokens | {plan.calibration_tokens:,}
    work | {work:.1f} TFLOP
    time on this machine | {time}
    disk | {plan.disk_bytes:size}
    memory: the program itself | {plan.sizes[process]:size}
    memory: one decoder layer | {plan.sizes[layer]:size}
    memory: hidden states (in {activations}) | {plan.sizes[activation]:size}
    memory: forwards | {forwards:size}
    memory: statistics and solver | {plan.sizes[solve]:size}
    the linear layer that takes most | {solved[0]} x {solved[1]}
    memory: the model, generating windows | {writing:size}
    memory: {learning}, distilled | {distilling:size}
"""
USUAL = "if float32 can factorise every gram, as usual | {usual:size}"
PEAKS = """
    peak memory< of the {device}> | {peak:size}
    peak memory of the host | {host:size}
"""


def _peaks(on_gpu: bool, peak: int, host_peak: int) -> dict[str, Any]:
    """The values of `PEAKS`."""
    return {
        "device": "GPU" if on_gpu else None,
        "peak": peak,
        "host": host_peak if on_gpu else None,
    }


@dataclass(frozen=True, repr=False)
class CutPlanResult(Result):
    """What a structured cut would leave, and what it would need.

    Attributes:
        steps: the names of its steps, in order.
        before: the uncut model, counted.
        after: the cut model; None if that is known only during the run.
        unknown: the options that decide about it then.
        plan: what the step that cuts heads and neurons needs at most; None without that step.
    """

    steps: tuple[str, ...]
    before: Counts
    after: Counts | None
    unknown: tuple[str, ...]
    plan: PrunePlan | None

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        sizes = Result.to_json(replace(self, plan=None))
        return {**sizes, "plan": self.plan and self.plan.to_json()}

    def blocks(self) -> Sequence[Block]:
        """A table of sizes, and one of what the run needs."""
        peaks = _peaks(self.plan.on_gpu, self.plan.peak_bytes, 0) if self.plan else {}
        needs = {**vars(self), **peaks, "host": None}
        return [
            compared("plan of the cut", self.before, self.after),
            Table.about("", NEEDS + PEAKS, needs),
        ]


NEEDS = """
    steps | {steps:words}
    sizes are known during the run | {unknown:words}
"""


@dataclass(frozen=True, repr=False)
class TrainPlanResult(Result):
    """What a training would read, and what it would need.

    Attributes:
        objective: the loss, in words.
        text: the training texts.
        windows: number of training windows.
        sequence_length: tokens of a window.
        validation_windows: number of validation windows.
        steps: optimizer steps; None if the minutes decide.
        minutes: length of the training; None if the steps decide.
        tokens: tokens that the model would read; None if the minutes decide.
        memory: sizes in bytes by name, with `peak` and `host_peak`.
        disk_bytes: what the training writes at most.
    """

    objective: str
    text: str
    windows: int
    sequence_length: int
    validation_windows: int
    steps: int | None
    minutes: float | None
    tokens: int | None
    memory: Mapping[str, int]
    disk_bytes: int

    def blocks(self) -> Sequence[Block]:
        """One table."""
        memory = self.memory
        parts = ("process", "weights", "optimizer", "forward", "logits", "teacher", "masks")
        sizes = "".join(f"\n memory: {x} | {{memory[{x}]:size}}" for x in parts if memory[x])
        peaks = _peaks(bool(memory["on_gpu"]), memory["peak"], memory["host_peak"])
        rows = f"{TRAINING}{sizes}{PEAKS}"
        return [Table.about("plan of the training", rows, {**vars(self), **peaks})]


TRAINING = """
    objective | {objective}
    text | {text}
    windows | {windows:,} of {sequence_length} tokens
    validation windows | {validation_windows:,}
    steps | {steps:,}
    tokens | {tokens:,}
    length | {minutes:g} minutes
    disk | {disk_bytes:size}"""


@dataclass(frozen=True)
class ChainPlanStep:
    """A step of a chain, before it runs.

    Attributes:
        step: its verb; `source` for the model at the beginning.
        parameters: of the model after it; None if no plan of the source gives it.
        file_bytes: bytes of its weights; None likewise.
        peak_bytes: peak memory of the device that computes; None where no plan gives it.
        seconds: the shortest and the longest time; None likewise.
        unknown: why its needs are not known yet.
    """

    step: str
    parameters: int | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: tuple[float, float] | None = None
    unknown: str | None = None


@dataclass(frozen=True, repr=False)
class ChainPlanResult(Result):
    """What each step of a chain would leave and need.

    A step that reads the result of another one is planned on the source, which is no smaller.

    Attributes:
        steps: the source, then the steps.
    """

    steps: tuple[ChainPlanStep, ...]

    def blocks(self) -> Sequence[Block]:
        """One table."""
        time = {"time": lambda x: x.seconds and time_range(*x.seconds)}
        unknown = [f"{one.step}: {one.unknown}" for one in self.steps if one.unknown]
        return [
            Table.of_records("plan of the chain", self.steps, STEPS, **time),
            Line("A step after the first is planned on the source, which is no smaller.", "dim"),
            *map(Line, unknown),
        ]


STEPS = Columns(
    "after | parameters | weights | peak memory | time",
    "{step} | {parameters:,} | {file_bytes:size} | {peak_bytes:size} | {time}",
)


@dataclass(frozen=True, repr=False)
class FitPlanResult(Result):
    """What a fit would try, within bounds that can be kept.

    Attributes:
        linears: number of linear layers that get a format each.
        file_bytes: weight files of the model as it is.
        bounds: by option: the bound, and the nearest that is possible; empty if that is not known.
        formats: the names of the formats of a linear layer.
        tokens_to_heal: tokens on which the best models learn; 0 for none.
        minutes: time that the fit keeps; None for no limit.
    """

    linears: int
    file_bytes: int
    bounds: Mapping[str, tuple[str, str]]
    formats: tuple[str, ...]
    tokens_to_heal: int
    minutes: float | None

    @property
    def shown_formats(self) -> str:
        """The values, and the zeros that each of them may have."""
        parts = [name.rpartition(" zeros, ")[::2] for name in self.formats]
        values = ", ".join(dict.fromkeys(stored for _, stored in parts))
        zeros = ", ".join(dict.fromkeys(share for share, _ in parts if share))
        return f"{values}; each with {zeros} of zeros or none" if zeros else values

    def search(self) -> list[tuple[str, str]]:
        """Rows of the table about the search."""
        return [
            ("linear layers", f"{self.linears:,}"),
            ("formats of each", self.shown_formats),
            ("healing", f"{self.tokens_to_heal:,} tokens" if self.tokens_to_heal else "none"),
            ("time", "no limit" if self.minutes is None else f"{self.minutes:g} minutes"),
        ]

    def blocks(self) -> Sequence[Block]:
        """A table of bounds, and one of the search."""
        bounds = [(name, *values) for name, values in self.bounds.items()]
        rows = [("weight files now", binary_size(self.file_bytes)), *self.search()]
        return [
            Table.of("bounds of the fit", ("bound", "given", "nearest possible"), bounds),
            Table.facts("", rows),
        ]
