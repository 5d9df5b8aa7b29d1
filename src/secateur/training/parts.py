"""What one process has of a tensor that is shared out: some of its rows.

FSDP2 divides a parameter along its first dimension, as `torch.chunk` does. Everything that goes
with a parameter (mask, moments, what is read of it) is divided in the same way, by each process
for itself: no process sends anything, and none needs the whole tensor for longer than it takes to
read it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["as_part", "is_shared", "local", "part_of", "rows_of", "whole"]


def is_shared(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, unless it is shared out."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of(parameter: Any) -> slice:
    """The rows of a shared parameter that this process has."""
    mesh, count = parameter.device_mesh, parameter.shape[0]
    size = -(-count // mesh.size())
    start = min(mesh.get_local_rank() * size, count)
    return slice(start, min(start + size, count))


def as_part(rows: Tensor, parameter: Any) -> Tensor:
    """The rows that this process has of a tensor that is shared out as a parameter is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of a parameter's shape, where and shared out as the parameter is.

    Args:
        value: whole, on any device; it is not kept alive by a part of it.
        parameter: whole or shared out.
    """
    if is_shared(value):
        return value
    device = local(parameter).device
    if not is_shared(parameter):
        return value.to(device)
    return as_part(value[rows_of(parameter)].to(device, copy=True), parameter)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; all processes must ask for it."""
    full: Tensor = tensor.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    return full.cpu()
