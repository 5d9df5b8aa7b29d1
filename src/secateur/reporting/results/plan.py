"""What `plan` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.engine.plan import Plan
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table, gib, mib, not_pruned
from secateur.reporting.wording import time_range

__all__ = ["PlanResult"]


@dataclass(frozen=True, repr=False)
class PlanResult(Result):
    """The memory, disk, work and time that a pruning run would need.

    Attributes:
        plan: sizes in bytes, and work.
        activations: where hidden states would be stored between layers: memory or disk.
    """

    plan: Plan
    activations: str

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
        return {**self.plan.to_json(), "activations": self.activations}

    def blocks(self) -> Sequence[Block]:
        """One table."""
        plan = self.plan
        out, columns = plan.solve_shape
        rows = [
            ("decoder layers", f"{plan.num_hidden_layers}"),
            ("weights that can be pruned", f"{plan.prunable_weights:,}"),
            ("not pruned", not_pruned(plan.left)),
            ("calibration tokens", f"{plan.calibration_tokens:,}"),
            ("work", f"{plan.flops / 1e12:.1f} TFLOP"),
            *([("time on this machine", time_range(*plan.seconds))] if plan.seconds else []),
            ("disk", gib(plan.disk_bytes)),
            ("memory: the program itself", mib(plan.process_bytes)),
            ("memory: one decoder layer", mib(plan.layer_bytes)),
            (f"memory: hidden states (in {self.activations})", mib(plan.activation_bytes)),
            ("memory: forwards", mib(plan.forward_bytes + plan.waiting_bytes)),
            ("memory: statistics and solver", mib(plan.solve_bytes)),
        ]
        if out:
            rows.append(("  the linear that takes most", f"{out} x {columns}"))
        learning = "one layer or the head" if plan.sweep_windows else "the whole model"
        optional = {
            "memory: the whole model, generating windows": plan.writing_bytes,
            f"memory: {learning}, distilled": plan.distilling_bytes,
        }
        rows += [(name, mib(size)) for name, size in optional.items() if size]
        rows.append(
            ("peak memory of the GPU" if plan.on_gpu else "peak memory", gib(plan.peak_bytes))
        )
        if plan.fallback_bytes:
            usual = plan.peak_bytes - plan.fallback_bytes
            rows.append(("  if float32 can factorise every gram, as usual", gib(usual)))
        if plan.on_gpu:
            rows.append(("peak memory of the host", gib(plan.host_peak_bytes)))
        return [Table.of("plan", ("", ""), rows)]
