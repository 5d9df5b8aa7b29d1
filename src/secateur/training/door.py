"""Where training runs: one process or several, through accelerate.

One process is plain torch. Several, started by `accelerate launch` or `torchrun`, are FSDP2: each
holds a part of every weight, gradient, moment and mask, and reads its share of every step's
windows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import RecipeError
from secateur.models.architecture import describe

__all__ = ["Door", "checkpointed", "whole"]


class Door:
    """The processes that train together.

    Args:
        device: where the model lies, if there is one process only.
    """

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        options: dict[str, Any] = {"cpu": device.type == "cpu"}
        if self.ranks > 1:
            from accelerate import FullyShardedDataParallelPlugin

            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
                reshard_after_forward=True,
            )
        self.accelerator = Accelerator(**options)
        self.rank: int = self.accelerator.process_index
        self.device = self.accelerator.device if self.ranks > 1 else device

    @property
    def main(self) -> bool:
        """Whether this process writes files and tells of progress."""
        return self.rank == 0

    def shard(self, model: Any) -> None:
        """Share a model out, in place; nothing happens in a single process.

        Raises:
            RecipeError: accelerate has not made an FSDP2 model of it.
        """
        if self.ranks == 1:
            return
        layers = describe(model).layers(model)
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [
            type(layers[0]).__name__
        ]
        self.accelerator.prepare_model(model)
        if not all(hasattr(p, "to_local") for p in model.parameters()):
            raise RecipeError(
                "the model was not sharded: these processes were not set up for FSDP2",
                remedy="start them with `torchrun` or with `accelerate launch --use_fsdp "
                "--fsdp_version 2`",
            )

    def mean(self, value: float) -> float:
        """Of a number over all processes."""
        if self.ranks == 1:
            return value
        told: Tensor = self.accelerator.reduce(
            torch.tensor(value, dtype=torch.float64, device=self.device), "mean"
        )
        return float(told)

    def same(self, value: float) -> float:
        """The number of the main process, for all."""
        return value if self.ranks == 1 else self.mean(value if self.main else 0.0) * self.ranks

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; all processes must ask for it."""
    full: Tensor = tensor.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    return full.cpu()


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
