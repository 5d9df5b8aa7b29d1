"""Time, memory and traffic of pruning on many GPUs, on paper: a dry run of `prune` for a cluster.

R = nodes · devices processes, T calibration tokens, t = T / R of them in each process. A layer has
groups of linears that share an input. `copies` of a group are experts, and each sees a `share` of
the tokens. Sums run over the groups, and inner sums over the linears (out, in) of a group:

    reading    bytes of the model / rate of the network, once for each machine
    forwards   passes · (2 · t · Σ copies · share · Σ out · in + 2 · t · S · width) / (peak · e)
    gathering  Σ copies · share · t · in² / (peak · SINGLE · e)                          with a gram
    solving    (p · in³ + s · Σ out · in²) / (peak · SINGLE · e), of the busiest process
    sums       2 (R − 1) / R · 4 · Σ copies · in² bytes / link     with a gram, else 8 · in
    weights    2 · Σ copies · Σ out · in bytes / link

S is the length of a window, width that of all query heads, e the fraction of the peak that engines
reach, and `SINGLE` the float32 rate as a fraction of the bfloat16 rate. The parts of a solver take
as long as p and s operations of a plain matrix product for each number; p and s were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from secateur.advisor.facts import Efficiency, Estimate, Hardware, read_facts
from secateur.engine.prepared import method_of
from secateur.errors import RecipeError
from secateur.models.plain_decoder import PlainDecoder
from secateur.parallel.ranks import micro_batches, owners
from secateur.recipes.prune import PruneCall, PruneRecipe
from secateur.reporting.tables import Block, Line, Result, Table, binary_size, time_range

Shape = tuple[int, int]

SINGLE = 1 / 16
"""Float32 without tensor cores, as a fraction of bfloat16 with them: 67 / 989 on an H100."""

SOLVER_COSTS = {"zero": (0.0, 0.0), "obs": (4.4, 13.0), "alps": (0.7, 156.0)}
"""(p, s) by solver, measured on one core for 1024 inputs and outputs; wider matrices need less."""

GPU_LINK_BYTES = 200e9
"""Bytes a second between two GPUs of one machine that sums reach; our estimate for NVLink."""

MICRO_BATCH = 2048


@dataclass(frozen=True)
class PlannedGroup:
    """Linears that share an input.

    Attributes:
        shapes: (out, in) of each.
        copies: number of such groups in a layer: of experts.
        share: the fraction of the tokens that each copy sees.
    """

    shapes: tuple[Shape, ...]
    copies: int = 1
    share: float = 1.0

    @property
    def columns(self) -> int:
        """The number of input features."""
        return self.shapes[0][1]

    @property
    def weights(self) -> int:
        """Weights of one copy."""
        return sum(out * columns for out, columns in self.shapes)


@dataclass(frozen=True)
class PlannedModel:
    """What the plan needs of a model with equal layers.

    Attributes:
        layers: number of decoder layers.
        hidden: channels of the residual stream.
        width: query heads times their size.
        groups: groups of a layer.
        other: weights outside the decoder layers.
    """

    layers: int
    hidden: int
    width: int
    groups: tuple[PlannedGroup, ...]
    other: int

    @classmethod
    def of(cls, sizes: PlainDecoder) -> PlannedModel:
        """A decoder of Llama's kind: q, k, v; o; gate, up; down, in each expert."""
        query, value = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
        hidden, ffn = sizes.hidden, sizes.ffn
        copies, share = max(1, sizes.experts), sizes.experts_per_token / max(1, sizes.experts)
        share = share if sizes.experts else 1.0
        return cls(
            sizes.layers,
            hidden,
            query,
            (
                PlannedGroup(((query, hidden), (value, hidden), (value, hidden))),
                PlannedGroup(((hidden, query),)),
                PlannedGroup(((ffn, hidden), (ffn, hidden)), copies, share),
                PlannedGroup(((hidden, ffn),), copies, share),
            ),
            sizes.vocabulary * hidden * (1 if sizes.tied else 2),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        return sum(group.copies * group.weights for group in self.groups)

    @property
    def parameters(self) -> int:
        """All weights of matrices."""
        return self.layers * self.layer_weights + self.other


@dataclass(frozen=True)
class Machines:
    """The machines of a run.

    Attributes:
        nodes: number of machines.
        devices: GPUs of each.
        hardware: what a GPU is.
        efficiency: the fractions of its data sheet that are reached.
        network_bytes: bytes a second of the network of one machine.
    """

    nodes: int
    devices: int
    hardware: Hardware
    efficiency: Efficiency
    network_bytes: float

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.nodes * self.devices

    @property
    def link_bytes(self) -> float:
        """Bytes a second that each process sends in a ring, which enters each machine once."""
        return GPU_LINK_BYTES if self.nodes == 1 else min(GPU_LINK_BYTES, self.network_bytes)

    def seconds(self, flops: float, rate: float = 1.0) -> Estimate:
        """The time of work on one device, at a fraction of its peak in bfloat16."""
        peak = self.hardware.tflops["bf16"] * 1e12 * rate
        return Estimate(*self.efficiency.compute).map(lambda part: flops / (peak * part))


@dataclass(frozen=True)
class ClusterPhase:
    """One kind of work of a run.

    Attributes:
        name: what it is.
        seconds: its time.
        sent_bytes: bytes that each process sends and receives.
        read_bytes: bytes that each machine reads.
    """

    name: str
    seconds: Estimate
    sent_bytes: float = 0.0
    read_bytes: float = 0.0


@dataclass(frozen=True)
class ClusterPlan:
    """What a run would need.

    Attributes:
        ranks: number of processes.
        phases: kinds of work, one after the other.
        device_bytes: memory of each GPU at the peak.
        host_bytes: host memory of each process.
    """

    ranks: int
    phases: tuple[ClusterPhase, ...]
    device_bytes: float
    host_bytes: float

    @property
    def seconds(self) -> Estimate:
        """The time of the run."""
        total = Estimate.exact(0.0)
        for phase in self.phases:
            total = total + phase.seconds
        return total


def plan_cluster(
    model: PlannedModel,
    machines: Machines,
    *,
    tokens: int,
    length: int,
    solver: str,
    gram: bool,
    whole_layer: bool = False,
    asymmetric: bool = False,
) -> ClusterPlan:
    """Plan a run.

    Args:
        model: the model, in bfloat16.
        machines: the machines.
        tokens: number of calibration tokens.
        length: tokens in a window.
        solver: name of the solver.
        gram: whether grams are gathered; otherwise norms.
        whole_layer: whether the linears of a layer are solved at once (`--sequential layer`).
        asymmetric: whether the dense model runs beside the pruned one.

    Raises:
        RecipeError: the cost of this solver is unknown, or there are fewer windows than processes.
    """
    if solver not in SOLVER_COSTS:
        raise RecipeError(
            f"the cost of the solver {solver!r} on a cluster was not measured",
            remedy=f"plan with one of: {', '.join(SOLVER_COSTS)}",
        )
    ranks, windows = machines.ranks, tokens // length
    micro_batches(windows, MICRO_BATCH, ranks)  # refuses more processes than windows
    own = -(-windows // ranks) * length
    passes = 2 if whole_layer or asymmetric else 1
    active = sum(g.copies * g.share * g.weights for g in model.groups)
    forwards = passes * model.layers * (2 * own * active + 2 * own * length * model.width)
    gathered = sum(g.copies * g.share * own * g.columns**2 for g in model.groups) if gram else 0.0
    solved = model.layers * busiest(model.groups, ranks, SOLVER_COSTS[solver], whole_layer)
    sums = [g.copies * (4 * g.columns**2 if gram else 8 * g.columns) for g in model.groups]
    ring = 2 * (ranks - 1) / ranks
    sent = model.layers * ring * sum(sums)
    weights = model.layers * 2 * model.layer_weights * (ranks > 1)
    stored = 2 * model.parameters
    reading = Estimate.exact(stored / machines.network_bytes)
    wide = max(g.columns for g in model.groups)
    held = model.layer_weights * (2 if asymmetric else 1) * 2
    statistics = sum(sums) if whole_layer else max(sums)
    working = 4 * 4 * wide**2 if gram else 0
    forward = MICRO_BATCH * (8 * model.hidden + 3 * wide) * 2
    return ClusterPlan(
        ranks,
        (
            ClusterPhase("reading the model", reading, read_bytes=stored),
            ClusterPhase("forwards", machines.seconds(forwards)),
            ClusterPhase("gathering statistics", machines.seconds(model.layers * gathered, SINGLE)),
            ClusterPhase("summing statistics", Estimate.exact(sent / machines.link_bytes), sent),
            ClusterPhase("solving", machines.seconds(solved, SINGLE)),
            ClusterPhase("sending weights", Estimate.exact(weights / machines.link_bytes), weights),
        ),
        device_bytes=held + statistics + working + forward,
        host_bytes=2.0 * own * model.hidden * (2 if asymmetric else 1),
    )


def busiest(
    groups: Sequence[PlannedGroup], ranks: int, costs: tuple[float, float], whole_layer: bool
) -> float:
    """Operations of the process that solves most in a layer.

    Args:
        groups: groups of the layer.
        ranks: number of processes.
        costs: (p, s) of the solver.
        whole_layer: whether all linears are solved at once; otherwise group after group.
    """
    prepare, solve = costs
    pieces = [
        [
            (out * columns**2, prepare * columns**3 + solve * out * columns**2)
            for out, columns in group.shapes
        ]
        for group in groups
        for _ in range(group.copies)
    ]
    at_once = [[piece for group in pieces for piece in group]] if whole_layer else pieces
    total = 0.0
    for together in at_once:
        busy = [0.0] * ranks
        owned = owners([cost for cost, _ in together], ranks)
        for (_, work), owner in zip(together, owned, strict=True):
            busy[owner] += work
        total += max(busy)
    return total


def plan_on_paper(recipe: PruneRecipe, cluster_call: PruneCall) -> ClusterPlanResult:
    """Plan the run of a recipe for a well-known shape on GPUs that are not here."""
    facts = read_facts()
    if recipe.model not in facts.shapes:
        raise RecipeError(
            f"{recipe.model} is no well-known shape, and a plan on paper needs one",
            where="--gpus",
            remedy=f"name one of: {', '.join(facts.shapes)}; or leave out --gpus to plan for this "
            "machine",
        )
    named = [name for name in facts.hardware if name.startswith(cluster_call.gpu)]
    hardware = facts.device(named[0] if len(named) == 1 else cluster_call.gpu)
    method, _ = method_of(recipe)
    length = recipe.calibration.sequence_length or 2048
    assert cluster_call.gpus is not None
    machines = Machines(
        cluster_call.nodes,
        cluster_call.gpus,
        hardware,
        facts.efficiency[hardware.kind],
        float(cluster_call.network.removesuffix("Gb")) * 1e9 / 8,
    )
    plan = plan_cluster(
        PlannedModel.of(facts.shapes[recipe.model]),
        machines,
        tokens=recipe.calibration.windows * length,
        length=length,
        solver=method.solver_name,
        gram="gram" in method.requires or recipe.asymmetric,
        whole_layer=recipe.sequential == "layer",
        asymmetric=recipe.asymmetric,
    )
    return ClusterPlanResult(recipe.model, hardware.name, plan)


@dataclass(frozen=True, repr=False)
class ClusterPlanResult(Result):
    """The time, memory and traffic that a pruning run on a cluster would need, on paper.

    Attributes:
        model: the model.
        hardware: what a GPU is.
        plan: the figures.
    """

    model: str
    hardware: str
    plan: ClusterPlan

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {**super().to_json(), "seconds": to_jsonable_python(self.plan.seconds)}

    def blocks(self) -> Sequence[Block]:
        """A table of phases, one of memory, and what the figures are."""
        rows = [
            (
                phase.name,
                time_range(phase.seconds.low, phase.seconds.high),
                binary_size(round(phase.sent_bytes)) if phase.sent_bytes else "",
                binary_size(round(phase.read_bytes)) if phase.read_bytes else "",
            )
            for phase in self.plan.phases
        ]
        total = self.plan.seconds
        rows.append(("all", time_range(total.low, total.high), "", ""))
        title = f"{self.model} in {self.plan.ranks} processes on {self.hardware}"
        columns = ("phase", "time", "each process sends", "each machine reads")
        memory = [
            ("memory of each GPU", binary_size(round(self.plan.device_bytes))),
            ("host memory of each process", binary_size(round(self.plan.host_bytes))),
        ]
        return [
            Table.of(title, columns, rows),
            Table.facts("", memory),
            Line("estimated from data sheets by the formulas in docs/machines.md; nothing was run"),
        ]
