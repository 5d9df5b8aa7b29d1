"""The part of a sharded tensor that one process holds: some of its rows.

FSDP2 divides a parameter along its first dimension, as `torch.chunk` does. Each process divides
the masks, moments and stored values of a parameter in the same way. No process sends anything, and
none keeps a whole tensor longer than it takes to read it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; the whole tensor if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of(parameter: Any) -> slice:
    """The rows of a sharded parameter that this process has."""
    mesh, count = parameter.device_mesh, parameter.shape[0]
    size = -(-count // mesh.size())
    start = min(mesh.get_local_rank() * size, count)
    return slice(start, min(start + size, count))


def as_part(rows: Tensor, parameter: Any) -> Tensor:
    """Return this process's rows of a tensor, divided like the parameter."""
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
    """Return a tensor of a parameter's shape, on the same device and divided in the same way.

    Args:
        value: the whole tensor, on any device. The result does not keep its memory alive.
        parameter: whole or sharded.
    """
    if is_shared(value):
        return value
    device = local(parameter).device
    if not is_shared(parameter):
        return value.to(device)
    return as_part(value[rows_of(parameter)].to(device, copy=True), parameter)


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor on the CPU. All processes must call this together."""
    full: Tensor = tensor.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    return full.cpu()
