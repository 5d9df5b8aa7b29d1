"""The tasks of a run: one frozen task for each linear of the decoder."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from secateur.calibration.statistics import of_gradients, of_inputs
from secateur.engine.prune.selection import Selection, last_match
from secateur.engine.stream.kinds import LayerLayout, refuse_unknown
from secateur.engine.stream.targets import Target
from secateur.errors import PatternError
from secateur.models.architecture import linears_of
from secateur.sparsity.methods import Method

log = logging.getLogger(__name__)

NOTHING: Mapping[str, Any] = MappingProxyType({})

LEFT_OUT = "left out by the recipe"
UNSEEN = "calibration cannot see its inputs"
UNREACHED = "no calibration token was routed to it"
NOT_ALLOCATED = "the allocation takes nothing from it"

MUCH_WORK = 1e14
"""Floating-point operations that take a processor at 100 GFLOP/s a quarter of an hour."""


@dataclass(frozen=True)
class LinearTask:
    """The task of a run for one linear.

    Attributes:
        name: its full name.
        shape: (out, in).
        method: how it is pruned.
        sparsity: the fraction of its weights that become zero; 0 leaves it unchanged.
        cost: cost of one of its units in an allocation's budget; None: the number of its weights.
        fixed: whether its sparsity is fixed, so no allocation changes it.
        rounded: whether the method changes it without pruning any weight.
        left: the reason why it stays unchanged, if its sparsity is 0.
    """

    name: str
    shape: tuple[int, int]
    method: Method
    sparsity: float
    cost: int | None = None
    fixed: bool = False
    rounded: bool = False
    left: str | None = None

    @property
    def changes(self) -> bool:
        """Whether the run changes the linear."""
        return self.rounded or self.sparsity > 0


Tasks = Mapping[str, LinearTask]
"""The tasks of a run, by the full names of the linears, in the order of the layers."""


def tasks_of(
    target: Target,
    selection: Selection,
    method: Method,
    sparsity: float,
    layouts: Sequence[LayerLayout] = (),
    *,
    methods: Mapping[str, Method] = NOTHING,
    costs: Mapping[str, int] = NOTHING,
) -> dict[str, LinearTask]:
    """The task of every linear of a model.

    Args:
        target: the model; its layers may be empty.
        selection: which linears, with exceptions.
        method: how linears are pruned.
        sparsity: sparsity of every linear without its own sparsity.
        layouts: layouts of the decoder layers, if calibration passes through them. Linears whose
            inputs no hook sees stay unchanged.
        methods: methods in place of `method`, by glob of linears. The last match counts.
        costs: see `LinearTask.cost`, by name.

    Raises:
        ArchitectureError: the parameters of a layer have an unknown layout.
        RecipeError: a glob matches nothing, or no linear is left to prune.
        PatternError, ShapeError: a matrix cannot hold its sparsity.
    """
    refuse_unknown(target)
    layer_name = target.architecture.layer_name
    shapes = {
        linear.name: linear.shape
        for index, layer in enumerate(target.layers)
        for linear in linears_of(layer, layer_name(index)).values()
    }
    selection.check(shapes, methods)
    unseen = {f"{layer_name(i)}.{n}" for i, layout in enumerate(layouts) for n in layout.unseen}
    found = {}
    for name, shape in shapes.items():
        own, asked = last_match(methods, name) or method, selection.asked(name, sparsity)
        left = UNSEEN if name in unseen else LEFT_OUT if asked == 0 else None
        task = LinearTask(
            name,
            shape,
            own,
            0.0 if left else asked,
            cost=costs.get(name),
            fixed=selection.override(name) is not None,
            rounded=own.solver.rounds and selection.selects(name),
            left=left,
        )
        check(task)
        found[name] = task
    warn_of_work(found)
    return found


def check(task: LinearTask) -> None:
    """Refuse a task that cannot be carried out.

    Raises:
        PatternError, ShapeError: the matrix cannot hold the sparsity; the message names the linear.
    """
    if task.sparsity > 0:
        try:
            task.method.check(task.shape, task.sparsity)
        except PatternError as error:
            raise type(error)(error.what, where=task.name, remedy=error.remedy) from None


def with_sparsities(tasks: Tasks, sparsity_of: Mapping[str, float]) -> dict[str, LinearTask]:
    """Return the tasks with the sparsities of an allocation."""
    given = {
        name: replace(tasks[name], sparsity=share, left=None if share > 0 else NOT_ALLOCATED)
        for name, share in sparsity_of.items()
    }
    return {**tasks, **given}


def left_dense(tasks: Tasks, names: Collection[str]) -> dict[str, LinearTask]:
    """Return the tasks, with linears that calibration did not reach left unchanged."""
    return {**tasks, **{n: replace(tasks[n], sparsity=0.0, left=UNREACHED) for n in names}}


def input_statistics(tasks: Tasks, *, asymmetric: bool) -> frozenset[str]:
    """The statistics of inputs that a run gathers.

    Args:
        tasks: tasks of the run.
        asymmetric: whether linears are fitted to the dense model, which needs a gram.
    """
    required = frozenset().union(*(task.method.requires for task in tasks.values()))
    return of_inputs(required) | (frozenset({"gram"}) if asymmetric else frozenset())


def gradient_statistics(tasks: Tasks) -> frozenset[str]:
    """The statistics of gradients that must be gathered before a run."""
    return of_gradients(frozenset().union(*(task.method.requires for task in tasks.values())))


def warn_of_work(tasks: Tasks) -> None:
    """Warn before the run about solvers that factorise for hours (`Solver.flops`)."""
    busy = [task for task in tasks.values() if task.sparsity > 0]
    total = sum(t.method.solver.flops(t.shape, t.method.pattern, t.sparsity) for t in busy)
    if total > MUCH_WORK:
        log.warning(
            "the solver %r will take about %.2g floating-point operations for this model, %.2g "
            "hours at 100 GFLOP/s, since each row of a weight has zeros of its own; the solver "
            "'admm' comes within a few percent for one factorisation an input",
            busy[0].method.solver_name,
            total,
            total / 1e11 / 3600,
        )
