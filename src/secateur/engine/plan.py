"""What a run needs in memory, the memory that is there, and plans that fit into it.

A plan is a list of needs. Each need belongs to phases of the run, and the peak is the largest
phase. If memory ends in spite of its plan, the error names the largest need (`explained`).

The memory that a forward keeps alive is hard to estimate. So one micro-batch passes through a
decoder layer on the meta device, where tensors have sizes but no content, and every operation is
counted (`rehearse`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from secateur.engine.stream.calls import LayerCall, call_layer, kind_of, on_meta
from secateur.engine.stream.halted_forwards import LiveTensors
from secateur.errors import MemoryBudgetError, RecipeError
from secateur.models.architecture import Groups, linears_of, text_config
from secateur.models.attention import WrittenOut
from secateur.models.experts import OpenExperts
from secateur.models.skeleton import parameters_of
from secateur.models.targets import Target
from secateur.runs.environment import resident_bytes

SHORTER = "lower --micro-batch-tokens or --sequence-length"
ON_DISK = "use --activations disk, or lower --windows"
_PLACES = {"gpu": "on the GPU", "memory": "in memory", "disk": "on disk"}
_FREE_SHARE = 0.8
"""The default fraction of free memory that a run may use."""
_NAMED_NEEDS, _NAMED_SHARE = 3, 0.05
"""An error names so many needs of a phase: each at least this part of it."""


class Phase(NamedTuple):
    """A part of a run.

    Attributes:
        name: what happens in it.
        on_host: whether it counts the memory of this process while a GPU computes. Other phases
            count the memory of the computing device: of the GPU, or else of this process.
    """

    name: str
    on_host: bool = False


@dataclass(frozen=True)
class Need:
    """Memory that a run needs in some of its phases.

    Attributes:
        name: its key in JSON. Two needs with one name are one thing in two places.
        bytes: its size.
        phases: when it is there.
        text: what needs it.
        remedy: the options that make it smaller; empty if none does.
    """

    name: str
    bytes: int
    phases: tuple[Phase, ...]
    text: str
    remedy: str = ""


class PartNeeds(NamedTuple):
    """The needs of a part of a run; `passed_tokens` counts a forward with its backward thrice."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    passed_tokens: int = 0


PRUNING = Phase("pruning a layer")
TUNING = Phase("tuning a layer")
GENERATING = Phase("generating windows")
DISTILLING = Phase("distillation")
READING = Phase("reading through a layer")
PREDICTING = Phase("predicting tokens")
SENDING = Phase("sending layers to the GPU", on_host=True)
LOADING = Phase("loading the model", on_host=True)


def with_program(needs: Sequence[Need], on_gpu: bool) -> tuple[Need, ...]:
    """The needs with that of the program itself, which is there in all phases of its memory."""
    phases = [phase for need in needs if need.bytes for phase in need.phases if not phase.on_host]
    there = (SENDING, LOADING) if on_gpu else tuple(dict.fromkeys(phases))
    return (Need("process", resident_bytes(), there, "the program itself"), *needs)


@dataclass(frozen=True)
class Plan:
    """The needs of a run.

    Attributes:
        needs: everything that takes memory.
        on_gpu: whether a GPU computes with its own memory.
        disk_bytes: the maximum disk use.
    """

    needs: tuple[Need, ...]
    on_gpu: bool
    disk_bytes: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name of the need: on the computing device, if it is in two places."""
        return {need.name: need.bytes for need in self.needs}

    @property
    def phases(self) -> dict[Phase, int]:
        """The memory of each phase in bytes. Without a GPU no phase is on its host."""
        found = Counter[Phase]()
        for need in self.needs:
            there = (phase for phase in need.phases if self.on_gpu or not phase.on_host)
            found.update(dict.fromkeys(there, need.bytes))
        return found

    @property
    def peak_bytes(self) -> int:
        """The estimated peak memory of the computing device: the GPU, or this process."""
        return max(size for phase, size in self.phases.items() if not phase.on_host)

    @property
    def host_peak_bytes(self) -> int:
        """The estimated peak memory of this process."""
        return max(size for phase, size in self.phases.items() if phase.on_host == self.on_gpu)

    def to_json(self) -> dict[str, Any]:
        """All figures of the memory."""
        peaks = {"peak": self.peak_bytes, "host_peak": self.host_peak_bytes}
        return {**peaks, **self.sizes, "on_gpu": self.on_gpu}


@dataclass(frozen=True)
class Budget:
    """The maximum number of bytes that a run may use.

    Attributes:
        computing: for the computing device: a GPU, or this process.
        host: for this process if a GPU computes; None without a GPU.
    """

    computing: float
    host: float | None

    def shortage(self, plan: Plan) -> str | None:
        """Describe with numbers which memory is too small for a plan. None if it fits."""
        if self.host is None:
            return _short("", plan.peak_bytes, self.computing)
        found = [_short(" on the GPU", plan.peak_bytes, self.computing)]
        found.append(_short(" on the host", plan.host_peak_bytes, self.host))
        return "; ".join(x for x in found if x) or None

    def refusal(self, plan: Plan, what: str) -> MemoryBudgetError:
        """The error for a plan that does not fit, with all phases that are too large.

        Args:
            plan: the plan.
            what: the first part of the message.
        """
        remedies: dict[str, None] = {}
        for phase, size in plan.phases.items():
            limit = self.host if phase.on_host and self.host is not None else self.computing
            if size > limit:
                needs = sorted(
                    (x for x in plan.needs if phase in x.phases), key=lambda need: -need.bytes
                )
                large = [x for x in needs if x.bytes > _NAMED_SHARE * size][:_NAMED_NEEDS]
                parts = ", ".join(f"{need.text} {need.bytes / 2**30:.2f}" for need in large)
                what += f"; {phase.name} takes {size / 2**30:.2f} GiB, most of it: {parts}"
                avoidable = [x for x in needs if x.remedy]
                if size - sum(x.bytes for x in avoidable) <= limit:  # else no remedy is enough
                    remedies |= dict.fromkeys([x.remedy for x in avoidable][:_NAMED_NEEDS])
        less = "; ".join(remedies)
        return MemoryBudgetError(what, remedy=f"{less}{less and '; or '}raise --max-memory")


def _short(place: str, needed: int, budget: float) -> str | None:
    if needed <= budget:
        return None
    return f"{needed / 2**30:.2f} GiB{place}, the budget is {budget / 2**30:.2f} GiB"


def memory_budget(most: int | None, device: torch.device, sharing: int = 1) -> Budget:
    """Return the memory that a run may use at its peak.

    Args:
        most: bytes of the computing device: of a GPU, or else of this process. None takes four
            fifths of the free memory. The host of a GPU always uses four fifths.
        device: the computing device.
        sharing: number of processes that share the host. Each has a GPU of its own.
    """
    free = psutil.virtual_memory().available / sharing
    process = _FREE_SHARE * (free + resident_bytes())  # what it holds already counts as its own
    if device.type != "cuda":
        return Budget(most or process, None)
    return Budget(most or _FREE_SHARE * torch.cuda.mem_get_info(device)[0], process)


_AnyPlan = TypeVar("_AnyPlan", bound=Plan)
_Way = TypeVar("_Way")


def fitting(
    planned: Callable[[_Way], _AnyPlan], ways: Mapping[_Way, str], budget: Budget, what: str
) -> tuple[_AnyPlan, _Way]:
    """Return the first plan that fits in memory, and its way.

    Args:
        planned: returns the plan of a way.
        ways: the best one first, each with its words in the error; `{}` is its shortage.
        budget: the memory.
        what: the first part of the error.

    Raises:
        MemoryBudgetError: every way needs more than there is; the message gives numbers and
            remedies.
    """
    tried = []
    for way, text in ways.items():
        plan = planned(way)
        shortage = budget.shortage(plan)
        if shortage is None:
            return plan, way
        tried.append(text.format(shortage))
    raise budget.refusal(plan, what + "; ".join(tried))


def fitting_plan(
    planned: Callable[[str], _AnyPlan], device: torch.device, activations: str, budget: Budget
) -> tuple[_AnyPlan, str]:
    """Return the first plan that fits in memory, and the storage of its hidden states.

    Args:
        planned: returns the plan with hidden states on the `gpu`, in `memory` or on `disk`.
        device: the computing device.
        activations: allows only that storage; `auto` all that the device has.
        budget: the memory.

    Raises:
        MemoryBudgetError: no plan fits the budget.
        RecipeError: hidden states are to be on a GPU, and a CPU computes.
    """
    if activations == "gpu" and device.type != "cuda":
        raise RecipeError(
            f"hidden states cannot be on a GPU, because {device} computes",
            where="--activations",
            remedy="use auto, memory or disk; or compute on a GPU with --device cuda",
        )
    places = ("gpu", "memory", "disk") if device.type == "cuda" else ("memory", "disk")
    tried = places if activations == "auto" else (activations,)
    ways = {place: f"with activations {_PLACES[place]}: {{}}" for place in tried}
    return fitting(planned, ways, budget, "the run needs more memory than there is; ")


_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch's allocators put it where they raise a plain RuntimeError."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory of the processor or of a GPU has ended."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error).lower() for x in _SAYINGS)


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Turn the end of memory into an error that names the largest need of the plan.

    Raises:
        MemoryBudgetError: memory has ended inside the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        need, gib = max((x for x in plan.needs if x.remedy), key=lambda need: need.bytes), 2**30
        why = (str(error).strip() or "no memory").splitlines()[0]
        planned, free = plan.peak_bytes / gib, psutil.virtual_memory().available / gib
        raise MemoryBudgetError(
            f"memory has ended: {why}; the plan was {planned:.2f} GiB at most, and {free:.2f} GiB "
            "of the host are free now",
            where=f"{need.text} needs most, {need.bytes / gib:.2f} GiB",
            remedy=f"close other programs, or {need.remedy}; then run again with --resume, which "
            "keeps finished layers",
        ) from error


def weights_of(module: nn.Module) -> int:
    """The number of weights in a module, tied ones once."""
    return sum(p.numel() for p in parameters_of(module).values())


def model_bytes(target: Target) -> int:
    """The size of the whole model in its dtype."""
    return weights_of(target.model) * target.dtype.itemsize


def working_weights(target: Target) -> int:
    """Number of weights in the decoder's matrices that one token uses, without unused experts."""
    architecture, config = target.architecture, text_config(target.model.config)
    experts, total = architecture.experts, 0.0
    chosen = experts.per_token(config) if experts else None
    for index, layer in enumerate(target.layers):
        counts = [len(m) for m in layer.modules() if isinstance(m, OpenExperts)]
        for linear in linears_of(layer, architecture.layer_name(index)).values():
            share = 1.0  # of the tokens that use the linear
            if chosen is not None and counts and architecture.of_expert(linear.name):
                share = min(1.0, chosen / counts[0])
            total += share * linear.shape[0] * linear.shape[1]
    return round(total)


def layers_by_kind(target: Target, calls: list[LayerCall]) -> list[tuple[int, LayerCall, int]]:
    """The first layer of each kind, how it is called, and the number of layers of that kind."""
    of = [kind_of(*pair) for pair in zip(target.layers, calls, strict=True)]
    # in the order in which the kinds first appear
    return [(of.index(kind), calls[of.index(kind)], count) for kind, count in Counter(of).items()]


class AttentionOfPlan(TorchFunctionMode):
    """Attention for the plan. Like fused kernels, it makes no [sequence, sequence] matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An empty output of the right shape; every other function runs."""
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def rehearse(layer: nn.Module, groups: Groups, hidden: Tensor, call: LayerCall) -> tuple[int, int]:
    """The memory that one micro-batch keeps alive in one decoder layer, on the meta device.

    Returns:
        The maximum at any moment, including the input; and at any group of linears, where forwards
        wait for each other.
    """
    meta = torch.device("meta")
    call = call.to(meta)
    permanent = [*layer.parameters(), *layer.buffers(), *call.tensors()]
    live = LiveTensors(permanent, find_peak=True)
    halted = [0]
    linears = linears_of(layer, "")
    with ExitStack() as hooks, torch.no_grad(), live, AttentionOfPlan():
        for group in groups:
            halt = linears[group[0]].module.register_forward_pre_hook
            hooks.enter_context(halt(lambda module, args: halted.append(live.live_bytes())))
        x = torch.empty(hidden.shape, dtype=hidden.dtype, device=meta)
        with on_meta(layer):
            call_layer(layer, x, call)
    return live.peak_bytes, max(halted)


def rehearse_training(
    layer: nn.Module, hidden: Tensor, call: LayerCall, *, written_out: bool = False
) -> int:
    """The memory that a layer's forward keeps alive in float32, with everything for its backward.

    Args:
        layer: a decoder layer with its parameters on the meta device.
        hidden: the input of a micro-batch, for its shape.
        call: how the layer is called for it.
        written_out: whether attention keeps its probabilities.
    """
    meta, dtype = torch.device("meta"), next(layer.parameters()).dtype
    call = call.to(meta, torch.float32)
    with on_meta(layer):
        layer.to(torch.float32).requires_grad_(True)
        # only now: storages that the conversion frees would lend their addresses to activations
        permanent = [*layer.parameters(), *layer.buffers(), *call.tensors()]
        live = LiveTensors(permanent, find_peak=True)
        try:
            attention = WrittenOut() if written_out else AttentionOfPlan()
            with torch.enable_grad(), live, attention:
                x = torch.empty(hidden.shape, dtype=torch.float32, device=meta)
                out = call_layer(layer, x, call)
                del out
        finally:
            layer.to(dtype).requires_grad_(False)
    return live.peak_bytes
