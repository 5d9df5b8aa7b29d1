"""Masks that are held while a model is trained: what is pruned stays zero at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import RecipeError, SourceError, VerificationError
from secateur.models.architecture import describe
from secateur.models.inventory import inventory_of

__all__ = ["Masks", "local", "moments", "shard_like"]

FIXED_AT_ZERO = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)
"""Optimizers that leave a weight of 0 with gradient 0 and moments 0 where it is: each entry is
updated by itself, and 0 is a fixed point. Others are set back after every step."""


@dataclass(frozen=True)
class Masks:
    """Which weights are kept; the others are zero, and so are their gradients and moments.

    Before every step the gradients of pruned weights are set to 0, so that they neither move the
    weights nor count in the norm by which gradients are clipped. After it, weights and moments are
    set to 0, unless the optimizer is known to leave them there.

    Args:
        kept: by the name of the parameter, in its stored orientation; True = kept. Whoever changes
            them in place while a model is trained (gradual pruning) sets weights and moments back
            himself.
    """

    kept: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Any) -> Masks:
        """The zeros that the matrices of the decoder layers have now, where they have any.

        Also those of experts that transformers holds in one tensor.
        """
        matrices = inventory_of(model, describe(model))
        names = [matrix.name for matrix in matrices if matrix.is_decoder_matrix]
        masks = {name: model.get_parameter(name).detach() != 0 for name in names}
        return cls({name: mask for name, mask in masks.items() if not mask.all()})

    @classmethod
    def load(cls, file: Path) -> Masks:
        """Read what `save` wrote.

        Raises:
            SourceError: there is no such file, or it holds something else than masks.
        """
        if not file.is_file():
            raise SourceError("no such file of masks", where=str(file), remedy="check the path")
        kept = load_file(file)
        wrong = [name for name, mask in kept.items() if mask.dtype != torch.bool]
        if wrong or not kept:
            raise SourceError(
                f"the file holds no masks: {', '.join(wrong[:4]) or 'it is empty'}",
                where=str(file),
                remedy="masks are bool tensors by the names of parameters, True = kept",
            )
        return cls(kept)

    def save(self, file: Path) -> None:
        """Write the masks as bool tensors, by the names of parameters."""
        save_file({name: mask.contiguous() for name, mask in self.kept.items()}, file)

    def fit(self, model: nn.Module) -> None:
        """Refuse a model that these masks are not of.

        Raises:
            RecipeError: a parameter is not there, or has another shape.
        """
        parameters = dict(model.named_parameters())
        for name, mask in self.kept.items():
            if name not in parameters:
                raise RecipeError(
                    f"there is a mask of {name}, but the model has no such parameter",
                    remedy="give the masks of this model",
                )
            if parameters[name].shape != mask.shape:
                raise RecipeError(
                    f"the mask is {list(mask.shape)}, the weight {list(parameters[name].shape)}",
                    where=name,
                    remedy="give the masks of this model; a cut model needs masks of its own",
                )

    def beside(self, model: nn.Module) -> Masks:
        """The same masks, each where its parameter lies: on its device, sharded as it is.

        A mask that lies there already is not copied, so changes in place are seen here too.
        """
        parameters = {name: model.get_parameter(name) for name in self.kept}
        return Masks(
            {
                name: shard_like(mask, parameters[name])
                if hasattr(parameters[name], "to_local")
                else mask.to(parameters[name].device)
                for name, mask in self.kept.items()
            }
        )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the matrices that have a mask."""
        weights = sum(mask.numel() for mask in self.kept.values())
        kept = sum(int(mask.sum()) for mask in self.kept.values())
        return 1 - kept / weights if weights else 0.0

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of a model to 0."""
        for parameter, mask in self.of_parameters(model):
            local(parameter).mul_(mask)

    @torch.no_grad()
    def hold_gradients(self, model: nn.Module) -> None:
        """Before the optimizer's step: pruned weights have no gradient."""
        for parameter, mask in self.of_parameters(model):
            if parameter.grad is not None:
                local(parameter.grad).mul_(mask)  # seven times faster than masked_fill_ on a CPU

    @torch.no_grad()
    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """After the optimizer's step: pruned weights and their moments are 0."""
        if type(optimizer) in FIXED_AT_ZERO:
            return
        for parameter, mask in self.of_parameters(model):
            for held in (local(parameter), *moments(optimizer, parameter)):
                held.mul_(mask)

    @torch.no_grad()
    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make sure that all is as it should be.

        Raises:
            VerificationError: a pruned weight, or a moment of one, is not 0.
        """
        for name, mask in self.kept.items():
            parameter = model.get_parameter(name)
            gone = ~mask_of(mask, parameter)
            held = [local(parameter)]
            if optimizer is not None:
                held += list(moments(optimizer, parameter))
            filled = sum(int(x[gone].count_nonzero()) for x in held)
            if filled:
                raise VerificationError(
                    f"{filled} pruned weights or moments of them are not zero",
                    where=name,
                    remedy="something changed them after the optimizer's step: masks are held "
                    "only within the loop; Masks.apply sets the weights back",
                )

    def of_parameters(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter that has a mask, with this process's part of it on the same device."""
        for name, mask in self.kept.items():
            parameter = model.get_parameter(name)
            yield parameter, mask_of(mask, parameter)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, unless it is sharded over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def mask_of(mask: Tensor, parameter: Tensor) -> Tensor:
    """The part of a mask that belongs to this process's part of a parameter, on its device."""
    if hasattr(parameter, "to_local") and not hasattr(mask, "to_local"):
        mask = shard_like(mask, parameter)
    return local(mask).to(local(parameter).device)


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, shared out over the processes as a sharded parameter is."""
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[Tensor]:
    """What the optimizer remembers of each entry of a parameter."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield local(value)
