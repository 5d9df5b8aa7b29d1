"""Where training runs: one process or several, through accelerate.

One process is plain torch. Several, started by `accelerate launch` or `torchrun`, are FSDP2
(torch's `fully_shard`, which accelerate itself applies on GPUs only): each holds a part of every
weight, gradient, moment and mask, and reads its share of every step's windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.training.parts import is_shared

__all__ = ["ProcessGroup", "checkpointed", "units"]


class ProcessGroup:
    """The processes that train together.

    Args:
        device: of the model, if there is one process only.
    """

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.ranks: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.device = self.accelerator.device if self.ranks > 1 else device

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def shard(
        self,
        model: Any,
        fill: Callable[[nn.Module], None] = lambda unit: None,
        *,
        apart: bool = True,
    ) -> None:
        """Divide a model among the processes, in place; a single process keeps it whole.

        One unit after the other: no process has more than its part of those before it and the
        whole of one. A unit is gathered again when it is its turn.

        Args:
            model: a causal language model, or its skeleton; one that is shared out stays as it is.
                Its parameters are replaced, and the old ones are left empty.
            fill: called with each unit before it is shared out; it may give it its weights.
            apart: embeddings and head are units of their own, if they are not tied. False leaves
                them gathered once they were.

        Raises:
            ArchitectureError: two decoder layers have a parameter in common.
        """
        if self.ranks == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(model, FSDPModule):
            self.reshard(model)
            return
        mesh, chosen = init_device_mesh(self.device.type, (self.ranks,)), units(model, apart)
        refuse_shared(chosen)
        for unit in chosen:
            fill(unit)
            before = [p for p in unit.parameters() if not is_shared(p)]
            fully_shard(unit, mesh=mesh)
            for parameter in before:  # a part has been copied; torch lets go of the rest too late
                parameter.data = parameter.data.new_empty(0)

    def reshard(self, model: Any) -> None:
        """Free what the last forward gathered outside of the decoder layers.

        Without a backward, torch keeps it in place of the divided parameters.
        """
        if self.ranks > 1:
            model.reshard()

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.ranks == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(
            torch.tensor(value, dtype=torch.float64, device=self.device), "mean"
        )
        return float(reduced)

    def same(self, value: float) -> float:
        """The value of the main process, in all processes."""
        return value if self.ranks == 1 else self.mean(value if self.main else 0.0) * self.ranks

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all processes; exact for whole numbers below 2**53."""
        if self.ranks == 1:
            return list(values)
        reduced: Tensor = self.accelerator.reduce(
            torch.tensor(list(values), dtype=torch.float64, device=self.device), "sum"
        )
        return [float(x) for x in reduced.cpu()]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()


def units(model: Any, apart: bool = True) -> list[nn.Module]:
    """The parts of a model that are gathered one at a time: the decoder layers, and the rest.

    Args:
        model: a causal language model.
        apart: embeddings and head alone, where they are not tied, before the rest.
    """
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = [inputs, head] if apart and isinstance(head, nn.Linear) else []
    if outside and inputs.weight is head.weight:
        outside = []
    return [*describe(model).layers(model), *outside, model]


def refuse_shared(chosen: Sequence[nn.Module]) -> None:
    """Refuse units that have a parameter in common; the last holds all, so it is left out.

    Raises:
        ArchitectureError: naming it.
    """
    seen: set[int] = set()
    for unit in chosen[:-1]:
        own = {id(p): name for name, p in unit.named_parameters()}
        common = [own[key] for key in own.keys() & seen]
        if common:
            raise ArchitectureError(
                f"decoder layers share {len(common)} parameters, so they cannot be divided among "
                "several processes",
                where=min(common),
                remedy="start the command without torchrun or accelerate launch",
            )
        seen |= own.keys()


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Decoder layers keep only their inputs for the backward, and run again in it, for a while."""
    layers: list[nn.Module] = list(describe(model).layers(model))
    for layer in layers:
        layer.forward = _again(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is run again in the backward; without one coming, once."""

    def run(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return run
