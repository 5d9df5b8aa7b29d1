"""What a dry run of a verb returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import InstanceOf

from secateur.engine.plan_memory import PrunePlan
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.models import compared, not_pruned, on_host
from secateur.reporting.tables import Block
from secateur.runs.records import Counts


class PlanResult(Result):
    """The memory, disk, work and time that a pruning run would need.

    Attributes:
        plan: sizes in bytes, and work.
        activations: where hidden states would be stored between layers: memory or disk.
        processes: how many share the work; memory and work are those of the first one.
    """

    plan: InstanceOf[PrunePlan]
    activations: str
    processes: int = 1

    joined = "plan"

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

    def tables(self) -> list[Block]:
        """One table."""
        plan = self.plan
        return blocks_of(
            "PlanResult",
            self,
            shared=self.processes if self.processes > 1 else None,
            left=not_pruned(plan.left),
            work=plan.flops / 1e12,
            forwards=plan.sizes["forward"] + plan.sizes["waiting"],
            solved=plan.solve_shape if plan.solve_shape[0] else None,
            writing=plan.sizes["writing"] or None,
            distilling=plan.sizes["distilling"] or None,
            learning="one layer or the head" if plan.sweep_windows else "the whole model",
            usual=plan.peak_bytes - plan.fallback_bytes if plan.fallback_bytes else None,
            host=plan.host_peak_bytes if plan.on_gpu else None,
        )


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
    plan: InstanceOf[PrunePlan] | None

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        sizes = self.model_dump(mode="json", exclude={"plan"})
        return {**sizes, "plan": self.plan and self.plan.to_json()}

    def tables(self) -> list[Block]:
        """A table of sizes, and one of what the run needs."""
        table = compared("plan of the cut", self.before, self.after)
        return [table, *blocks_of("CutPlanResult", self)]


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
        memory: sizes in bytes by name, with `peak` and `host_peak`; `on_host` says whether weights
            and optimizer are on the host of a GPU.
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
    memory: dict[str, bool | int]
    disk_bytes: int

    def tables(self) -> list[Block]:
        """One table, without parts that take no memory."""
        host = self.memory["host_peak"] if self.memory["on_gpu"] else None
        return blocks_of("TrainPlanResult", self, host=host, learns=on_host(self.memory))


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


class ChainPlanResult(Result):
    """What each step of a chain would leave and need.

    A step that reads the result of another one is planned on the source, which is no smaller.

    Attributes:
        steps: the source, then the steps.
    """

    steps: tuple[ChainPlanStep, ...]


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
    bounds: dict[str, tuple[str, str]]
    formats: tuple[str, ...]
    tokens_to_heal: int
    minutes: float | None

    @property
    def entries(self) -> list[tuple[str, tuple[str, str]]]:
        """The bounds."""
        return [*self.bounds.items()]

    @property
    def shown_formats(self) -> str:
        """The values, and the zeros that each of them may have."""
        parts = [name.rpartition(" zeros, ")[::2] for name in self.formats]
        values = ", ".join(dict.fromkeys(stored for _, stored in parts))
        zeros = ", ".join(dict.fromkeys(share for share, _ in parts if share))
        return f"{values}; each with {zeros} of zeros or none" if zeros else values

    @property
    def healing(self) -> str:
        """The tokens on which models learn."""
        return f"{self.tokens_to_heal:,} tokens" if self.tokens_to_heal else "none"

    @property
    def time(self) -> str:
        """The limit of the time."""
        return "no limit" if self.minutes is None else f"{self.minutes:g} minutes"


class DraftPlanResult(FitPlanResult):
    """What the making of a draft would try.

    Attributes:
        heads: numbers of tokens that a head over frequent tokens may have.
    """

    heads: tuple[int, ...] = ()


class MTPPlanResult(Result):
    """What the measuring of MTP layers would try.

    Attributes:
        layers: of the checkpoint.
        heads: as of `DraftPlanResult`.
    """

    layers: int
    heads: tuple[int, ...]


class HeadPlanResult(Result):
    """What the training of a head that reads states would take.

    Attributes:
        taps: after how many of the parent's layers it reads states.
        tokens: that it learns on.
        disk_bytes: of the parent's states.
        minutes: time that the run keeps; None for no limit.
        heads: numbers of tokens that it may propose.
    """

    taps: tuple[int, int, int]
    tokens: int
    disk_bytes: int
    minutes: float | None
    heads: tuple[int, ...]
