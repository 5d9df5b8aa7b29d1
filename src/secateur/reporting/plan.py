"""What a dry run of `prune`, `structure`, `train` and `fit` returns, and what `methods` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.engine.plan_memory import PrunePlan
from secateur.reporting.tables import (
    Block,
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
        return {
            **self.plan.to_json(),
            "activations": self.activations,
            "processes": self.processes,
        }

    def blocks(self) -> Sequence[Block]:
        """One table."""
        plan, sizes = self.plan, self.plan.sizes
        out, columns = plan.solve_shape
        rows: list[tuple[str, str | None]] = [
            ("decoder layers", f"{plan.num_hidden_layers}"),
            ("weights that can be pruned", f"{plan.prunable_weights:,}"),
            ("not pruned", not_pruned(plan.left)),
            ("calibration tokens", f"{plan.calibration_tokens:,}"),
            ("work", f"{plan.flops / 1e12:.1f} TFLOP"),
            ("time on this machine", time_range(*plan.seconds) if plan.seconds else None),
            ("disk", binary_size(plan.disk_bytes)),
            ("memory: the program itself", binary_size(sizes["process"])),
            ("memory: one decoder layer", binary_size(sizes["layer"])),
            (f"memory: hidden states (in {self.activations})", binary_size(sizes["activation"])),
            ("memory: forwards", binary_size(sizes["forward"] + sizes["waiting"])),
            ("memory: statistics and solver", binary_size(sizes["solve"])),
        ]
        learning = "one layer or the head" if plan.sweep_windows else "the whole model"
        optional = {
            "memory: the model, generating windows": sizes["writing"],
            f"memory: {learning}, distilled": sizes["distilling"],
        }
        fallback = plan.fallback_bytes
        usual = binary_size(plan.peak_bytes - fallback) if fallback else None
        rows += [
            ("  the linear layer that takes most", f"{out} x {columns}" if out else None),
            *((name, binary_size(size)) for name, size in optional.items() if size),
            (_peak(plan.on_gpu), binary_size(plan.peak_bytes)),
            ("  if float32 can factorise every gram, as usual", usual),
            (HOST_PEAK, binary_size(plan.host_peak_bytes) if plan.on_gpu else None),
        ]
        several = f" of one of {self.processes} processes" if self.processes > 1 else ""
        return [Table.of(f"plan{several}", ("", ""), rows)]


HOST_PEAK = "peak memory of the host"


def _peak(on_gpu: bool) -> str:
    return "peak memory of the GPU" if on_gpu else "peak memory"


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
        before, after = self.before, self.after

        def line(what: str, key: str) -> tuple[str, str, str]:
            return what, f"{getattr(before, key):,}", f"{getattr(after, key):,}" if after else ""

        sizes = binary_size(before.file_bytes), binary_size(after.file_bytes) if after else ""
        rows = [
            line("parameters", "parameters"),
            line("decoder layers", "decoder"),
            line("KV cache, bytes per token", "kv_cache_bytes_per_token"),
            ("weight files", *sizes),
        ]
        plan = self.plan
        peak = f"{_peak(bool(plan and plan.on_gpu))}, heads and neurons"
        needs = [
            ("steps", ", ".join(self.steps)),
            ("sizes are known during the run", ", ".join(self.unknown) or None),
            (peak, binary_size(plan.peak_bytes) if plan else None),
        ]
        return [Table.of("plan of the cut", ("", "before", "after"), rows), Table.facts("", needs)]


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
        length = f"{self.steps:,} steps, {self.tokens:,} tokens" if self.steps else ""
        parts = ("process", "weights", "optimizer", "forward", "logits", "teacher", "masks")
        rows = [
            ("objective", self.objective),
            ("text", self.text),
            ("windows", f"{self.windows:,} of {self.sequence_length} tokens"),
            ("validation windows", f"{self.validation_windows:,}"),
            ("length", length or f"{self.minutes:g} minutes"),
            ("disk", binary_size(self.disk_bytes)),
            *((f"memory: {x}", binary_size(self.memory[x])) for x in parts if self.memory[x]),
            (_peak(bool(self.memory["on_gpu"])), binary_size(self.memory["peak"])),
            (HOST_PEAK, binary_size(self.memory["host_peak"]) if self.memory["on_gpu"] else None),
        ]
        return [Table.facts("plan of the training", rows)]


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

        def row(step: ChainPlanStep) -> dict[str, str | None]:
            size, peak = step.file_bytes, step.peak_bytes
            return {
                "after": step.step,
                "parameters": "" if step.parameters is None else f"{step.parameters:,}",
                "weights": "" if size is None else binary_size(size),
                "peak memory": None if peak is None else binary_size(peak),
                "time": time_range(*step.seconds) if step.seconds else None,
            }

        unknown = [f"{one.step}: {one.unknown}" for one in self.steps if one.unknown]
        return [
            Table.of_records("plan of the chain", [row(step) for step in self.steps]),
            Line("A step after the first is planned on the source, which is no smaller.", "dim"),
            *map(Line, unknown),
        ]


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

    def blocks(self) -> Sequence[Block]:
        """A table of bounds, and one of the search."""
        bounds = [(name, *values) for name, values in self.bounds.items()]
        rows = [
            ("weight files now", binary_size(self.file_bytes)),
            ("linear layers", f"{self.linears:,}"),
            ("formats of each", self.shown_formats),
            ("healing", f"{self.tokens_to_heal:,} tokens" if self.tokens_to_heal else "none"),
            ("time", "no limit" if self.minutes is None else f"{self.minutes:g} minutes"),
        ]
        return [
            Table.of("bounds of the fit", ("bound", "given", "nearest possible"), bounds),
            Table.facts("", rows),
        ]
