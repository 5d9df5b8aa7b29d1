"""The tasks of a run: one frozen task for each linear of the decoder.

Globs over the names of linears select which ones are pruned, and their sparsities (`Selection`).
Every matrix that stays unpruned has a reason (`skipped_matrices`).

`Settings` say how the work of a run is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from secateur.calibration.statistics import Gathering, held_bytes
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.calls import LayerLayout
from secateur.errors import PatternError, RecipeError, located
from secateur.machine import fast_matmuls
from secateur.models.architecture import linears_of
from secateur.models.experts import AT_ONCE
from secateur.models.inventory import StoredMatrix, summary, weights_of
from secateur.models.targets import Target, refuse_unknown
from secateur.parallel.ranks import ALONE, Ranks
from secateur.quantization.blocks import TYPES, BlockGrid
from secateur.recipes.prune import PruneRecipe
from secateur.registry import float32_bytes
from secateur.runs.records import SkippedMatrix
from secateur.sparsity.methods import Method

_NOTHING: Mapping[str, Any] = MappingProxyType({})

_LEFT_OUT = "left out by the recipe"
UNSEEN = "calibration cannot see its inputs"
_UNREACHED = "no calibration token was routed to it"
_NOT_ALLOCATED = "the allocation takes nothing from it"

COLLAPSED = 0.8
"""A linear has collapsed if it lost more than this share of its output's energy."""


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
        selected: whether the recipe selects it; a method that rounds changes it at sparsity 0 too.
        left: the reason why it stays unchanged, if its sparsity is 0.
    """

    name: str
    shape: tuple[int, int]
    method: Method
    sparsity: float
    cost: int | None = None
    fixed: bool = False
    selected: bool = False
    left: str | None = None

    @property
    def changes(self) -> bool:
        """Whether the run changes the linear."""
        return self.sparsity > 0 or self.rounded

    @property
    def rounded(self) -> bool:
        """Whether the method rounds its weights."""
        return self.selected and self.method.solver.rounds


Tasks = Mapping[str, LinearTask]
"""The tasks of a run, by the full names of the linears, in the order of the layers."""


def tasks_of(
    target: Target,
    selection: Selection,
    method: Method,
    sparsity: float,
    layouts: Sequence[LayerLayout] = (),
    *,
    methods: Mapping[str, Method] = _NOTHING,
    costs: Mapping[str, int] = _NOTHING,
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
        left = UNSEEN if name in unseen else _LEFT_OUT if asked == 0 else None
        task = LinearTask(
            name,
            shape,
            own,
            0.0 if left else asked,
            cost=costs.get(name),
            fixed=selection.override(name) is not None,
            selected=selection.selects(name),
            left=left,
        )
        _check(task)
        found[name] = task
    return found


def _check(task: LinearTask) -> None:
    """Refuse a task that cannot be done."""
    type = getattr(task.method.solver, "bits", 0)
    if isinstance(type, str) and task.rounded:
        grid = BlockGrid(type)
        with located(task.name):
            grid.row_bytes(task.shape[1])
            if task.sparsity and not grid.exact_zero:
                kept = ", ".join(name for name in TYPES if BlockGrid(name).exact_zero)
                raise PatternError(f"{type} has no exact 0", remedy=f"choose {kept}")
    if task.sparsity == 0:
        return
    pattern, (rows, columns) = task.method.pattern, task.shape
    with located(task.name):
        task.method.check(task.shape, task.sparsity)
        if pattern.pruned(task.shape, task.sparsity) == rows * columns:
            most = 1 - pattern.step(task.shape) / (rows * columns)
            raise PatternError(
                f"sparsity {task.sparsity:.12g} keeps no weight of this matrix of {rows} x "
                f"{columns}",
                remedy=f"give at most {most:.6g}, which keeps the least that the pattern can keep",
            )


def with_sparsities(tasks: Tasks, sparsity_of: Mapping[str, float]) -> dict[str, LinearTask]:
    """Return the tasks with the sparsities of an allocation."""
    given = {
        name: replace(tasks[name], sparsity=share, left=None if share > 0 else _NOT_ALLOCATED)
        for name, share in sparsity_of.items()
    }
    return {**tasks, **given}


def settled_allocation(work: Path) -> Path:
    """The file in the work folder with the sparsity that an allocation has given every linear."""
    return work / "allocation.json"


def left_dense(tasks: Tasks, names: Collection[str]) -> dict[str, LinearTask]:
    """Return the tasks, with linears that calibration did not reach left unchanged."""
    return {**tasks, **{n: replace(tasks[n], sparsity=0.0, left=_UNREACHED) for n in names}}


def gathering(tasks: Tasks, *, asymmetric: bool = False) -> Gathering:
    """The statistics that a run gathers.

    Args:
        tasks: tasks of the run.
        asymmetric: whether linears are fitted to the dense model, which needs a gram.
    """
    fitting = {"gram"} if asymmetric else set[str]()
    return Gathering.of(fitting.union(*(task.method.requires for task in tasks.values())))


_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Selection:
    """Globs over the names of linears (`matches`), for example `q_proj` or `model.layers.0.*`.

    Attributes:
        include: a linear is pruned if one of these matches.
        exclude: a linear stays dense if one of these matches.
        overrides: fixed sparsities of matching linears. The last match counts; 0 keeps a linear
            dense.
        starts: likewise, but an allocation may change the sparsity.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)

    def selects(self, name: str) -> bool:
        """Whether a linear is pruned at all."""
        chosen = any(matches(name, glob) for glob in self.include)
        return chosen and not any(matches(name, glob) for glob in self.exclude)

    def override(self, name: str) -> float | None:
        """The fixed sparsity of a linear, if any."""
        return last_match(self.overrides, name)

    def asked(self, name: str, sparsity: float) -> float:
        """The sparsity of a linear if the model's sparsity is `sparsity`."""
        if not self.selects(name):
            return 0.0
        own = self.override(name)
        if own is None:
            own = last_match(self.starts, name)
        return sparsity if own is None else own

    def check(self, names: Iterable[str], others: Iterable[str] = ()) -> None:
        """Refuse globs that match nothing, because they are spelling mistakes."""
        names = list(names)
        globs = [*self.include, *self.exclude, *self.overrides, *self.starts, *others]
        refuse_idle_globs(globs, names)
        if not any(self.selects(n) for n in names):
            raise RecipeError(
                "include and exclude leave no linear to prune",
                remedy="loosen them; `secateur inspect MODEL` lists the names",
            )


def matches(name: str, glob: str) -> bool:
    """Whether a glob fits a full name, or the last parts of it.

    Example:
        >>> from secateur.engine.prune.tasks import matches
        >>> matches("model.layers.0.mlp.up_proj", "up_proj"), matches("layers.0.up", "layers")
        (True, False)
    """
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def refuse_idle_globs(globs: Iterable[str], names: Sequence[str], kind: str = "linear") -> None:
    """Refuse globs that match no name, because they are spelling mistakes.

    Args:
        globs: to check.
        names: full names, at least one.
        kind: of what the names are.

    Raises:
        RecipeError: lists all such globs, and shows three names and a glob that works.
    """
    idle = [g for g in globs if not any(matches(n, g) for n in names)]
    if not idle:
        return
    near = get_close_matches(idle[0], names, n=1, cutoff=0.0)
    shown = [*near, *(name for name in names if name not in near)][:3]
    end = near[0].rpartition(".")[2] if kind == "linear" else ".".join(near[0].split(".")[-2:])
    raise RecipeError(
        f"no {kind} matches {', '.join(map(repr, idle))}",
        remedy=f"full names are {', '.join(shown)}, …; '*.{end}' matches that {kind} in every "
        "layer; `secateur inspect MODEL --layer 0` lists the names of one",
    )


def last_match(values: Mapping[str, _Value], name: str) -> _Value | None:
    """The value of the last glob that matches a name, if any does."""
    own = [value for glob, value in values.items() if matches(name, glob)]
    return own[-1] if own else None


def skipped_matrices(tasks: Tasks, matrices: Iterable[StoredMatrix]) -> list[SkippedMatrix]:
    """Every floating-point matrix of the model that a run does not prune, with the reason.

    Args:
        tasks: tasks of a planned or finished run.
        matrices: all matrices of the model (`models.inventory`).
    """
    return summary(_reasons(tasks, matrices))


def _reasons(tasks: Tasks, matrices: Iterable[StoredMatrix]) -> Iterator[tuple[str, str, int]]:
    """Name, reason and number of weights of every matrix that is not pruned."""
    matrices = list(matrices)
    yield from weights_of(matrices)
    for matrix in matrices:
        if matrix.linear is None:
            continue
        reason = tasks[matrix.linear.name].left
        if reason is not None:
            yield matrix.name, reason, matrix.weights


@dataclass(frozen=True)
class Settings:
    """How the work of a run is done. The task of a linear sets its sparsity.

    Attributes:
        sequential: `group` prunes each group of linears before the next one's statistics are
            gathered, in one pass; `layer` gathers for a whole layer first, as the papers do.
        asymmetric: fit each linear to its outputs in the dense model (`dense_target`), not to its
            outputs on the pruned model's inputs. The dense model then runs in step, group by
            group.
        asymmetric_damping: strength of the pull towards the dense weights, as a fraction of the
            mean diagonal of the gram.
        fast_matmuls: run calibration forwards in bfloat16 if the processor is faster at it.
        micro_batch_tokens: tokens that pass through a layer at once.
        activations: `gpu`, `memory` or `disk`: the storage of hidden states.
        work: folder for hidden states, ledger and gradients; None only for a run in memory.
        on_collapse: `stop` or `warn` when a layer has collapsed (`COLLAPSED`).
        tune_passes: passes over the windows in which a pruned layer is tuned; 0 tunes nothing.
        experts_at_once: the number of experts that get their inputs together.
        ranks: the processes that share the work.
    """

    sequential: str = "group"
    asymmetric: bool = False
    asymmetric_damping: float = 0.2
    fast_matmuls: bool = False
    micro_batch_tokens: int = 2048
    activations: str = "memory"
    work: Path | None = None
    on_collapse: str = "warn"
    tune_passes: int = 0
    experts_at_once: int = AT_ONCE
    ranks: Ranks = ALONE

    @classmethod
    def of(
        cls,
        recipe: PruneRecipe,
        activations: str,
        work: Path | None = None,
        ranks: Ranks = ALONE,
        experts_at_once: int = AT_ONCE,
    ) -> Settings:
        """The settings of a recipe."""
        return cls(
            sequential=recipe.sequential,
            asymmetric=recipe.asymmetric,
            asymmetric_damping=recipe.asymmetric_damping,
            fast_matmuls=recipe.fast_matmuls,
            micro_batch_tokens=recipe.memory.micro_batch_tokens,
            activations=activations,
            work=work,
            on_collapse=recipe.on_collapse,
            tune_passes=recipe.reconstruction.passes,
            experts_at_once=experts_at_once,
            ranks=ranks,
        )

    @property
    def in_memory(self) -> bool:
        """Whether hidden states are in memory, of the host or of the GPU."""
        return self.activations != "disk"

    @property
    def on_gpu(self) -> bool:
        """Whether hidden states and halted forwards stay in the memory of the GPU."""
        return self.activations == "gpu"

    @property
    def tunes(self) -> bool:
        """Whether pruned layers are tuned."""
        return self.tune_passes > 0

    def windows_at_once(self, windows: Tensor) -> int:
        """The number of windows [samples, sequence_length] in a micro-batch."""
        samples, length = windows.shape
        return min(samples, max(1, self.micro_batch_tokens // length))

    @property
    def dense_needed(self) -> bool:
        """Whether the dense model's hidden states pass as well."""
        return self.tunes or self.asymmetric

    def stream(self, target: Target, windows: Tensor) -> CalibrationStream:
        """The stream of calibration windows [samples, sequence_length] through a model."""
        return CalibrationStream(
            target,
            windows,
            self.micro_batch_tokens,
            self.in_memory,
            self.work,
            self.ranks,
            on_gpu=self.on_gpu,
        )

    def matmuls(self, device: torch.device) -> AbstractContextManager[object]:
        """A context for the forwards of calibration on a device."""
        return fast_matmuls(device) if self.fast_matmuls else nullcontext()


AT_ONCE_BYTES = {"cpu": 16 * 2**20, "cuda": 4 * 2**30}
"""The memory for solving linears of several experts at once. On a GPU a batch saves launches. On a
processor it saves little, and only where it stays in the caches."""
TARGET_SQUARES = 6
"""Maximum number of float32 matrices [in, in] in `dense_target`, besides the gram."""
HELD_TARGETS = 2
"""Number of these matrices that stay while the linears of a group are solved."""


class SolveMemory(NamedTuple):
    """The memory for solving one linear, with its statistics: of the linear that takes most.

    Attributes:
        most: bytes at worst.
        usual: bytes where float32 is enough for every factorisation.
        shape: (out, in) of the linear that takes `most`.
    """

    most: int = 0
    usual: int = 0
    shape: tuple[int, int] = (0, 0)


def solve_bytes(tasks: Tasks, *, asymmetric: bool) -> SolveMemory:
    """Return the maximum memory for solving one linear.

    Args:
        tasks: tasks of the run. Tasks that change nothing need no memory.
        asymmetric: whether linears are fitted to the dense model.
    """
    needs = {
        (linear_bytes(task, asymmetric=asymmetric), task.shape, task.method)
        for task in tasks.values()
        if task.changes
    }
    if not needs:
        return SolveMemory()
    most, shape, _ = max(needs, key=lambda need: need[:2])
    # not always of the same linear: another one may need more where float32 is enough
    usual = max(size - method.fallback_bytes(own) for size, own, method in needs)
    return SolveMemory(most, usual, shape)


def linear_bytes(task: LinearTask, *, asymmetric: bool) -> int:
    """The memory for solving one linear, with the statistics of its inputs."""
    names = gathering({task.name: task}, asymmetric=asymmetric).forward
    working = task.method.working_bytes(task.shape)
    if asymmetric:
        square = float32_bytes((task.shape[1], task.shape[1]))
        working = max(TARGET_SQUARES * square, working + HELD_TARGETS * square)
    return held_bytes(names, [task.shape]) + working


def solved_at_once(task: LinearTask, settings: Settings, device: torch.device) -> int:
    """The number of experts for which a linear is solved at once: as many as fit, at least one."""
    if not task.method.batched:
        return 1
    each = linear_bytes(task, asymmetric=settings.asymmetric)
    return max(1, AT_ONCE_BYTES[device.type] // each)


def solving_memory(
    target: Target,
    tasks: Tasks,
    groups: Sequence[Sequence[Sequence[tuple[int, int]]]],
    batches: Iterable[tuple[int, Sequence[tuple[int, int]]]],
    settings: Settings,
    meanwhile: int,
) -> SolveMemory:
    """The memory for the linear that needs most, with what else is there then.

    Args:
        target: the model.
        tasks: tasks of the run.
        groups: for each layer, the shapes of the linears that share an input.
        batches: the number of experts in each batch, and the shapes of the linears of one.
        settings: how the work is done.
        meanwhile: bytes of what an allocation and gradients keep of a layer.
    """
    names = gathering(tasks, asymmetric=settings.asymmetric).forward
    if settings.sequential == "layer":
        meanwhile += gathered_bytes(names, groups)  # all groups of a layer at once
    else:  # one group at a time; the linear that is solved counts its own statistics
        every = [group for layer in groups for group in layer]
        others = (held_bytes(names, x) - held_bytes(names, x[:1]) for x in every)
        meanwhile += max(others, default=0)
    # All sums of a batch are there, and for a moment their values beside them. A cross gram with
    # its value is only of a linear alone in its group.
    meanwhile += max(
        (
            (2 * count - 1) * held_bytes(names, shapes)
            + count * settings.asymmetric * (len(shapes) == 1) * 3 * float32_bytes(shapes[0])
            for count, shapes in batches
        ),
        default=0,
    )
    alike: dict[object, list[LinearTask]] = {}  # experts' linears that may be solved at once
    for task in tasks.values():
        if task.changes and target.architecture.of_expert(task.name):
            alike.setdefault((task.shape, task.method, task.sparsity), []).append(task)
    together = [
        linear_bytes(same[0], asymmetric=settings.asymmetric)
        * min(len(same), solved_at_once(same[0], settings, target.device))
        for same in alike.values()
    ]
    most, usual, shape = solve_bytes(tasks, asymmetric=settings.asymmetric)
    most, usual = (max(size, *together, 0) + meanwhile for size in (most, usual))
    return SolveMemory(most, usual, shape)


def gathered_bytes(
    names: Iterable[str], groups: Sequence[Sequence[Sequence[tuple[int, int]]]]
) -> int:
    """Bytes of the statistics of all groups of a layer; large with many experts."""
    return max((sum(held_bytes(names, group) for group in layer) for layer in groups), default=0)
