"""What travels from one decoder layer to the next, as one tensor with a row for each token.

In most models these are the hidden states. Some models have several hidden states for each token,
or layers that read keys and values of an earlier layer. All of it is packed into one tensor. So
whatever stores, shares or differentiates hidden states works with these models as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from secateur.errors import ArchitectureError

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Shared:
    """Tensors that one layer computes and later layers read, such as keys and values.

    Attributes:
        key: their name in the model's dictionary.
        sizes: (heads, head_dim) of each; a tensor has the shape [batch, heads, sequence, head_dim].
    """

    key: str
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Carried:
    """The columns of the packed tensor [batch, sequence, width]:

        hidden states 1 | … | hidden states n | keys, values of one kind of layer | …

    Attributes:
        hidden: the hidden size.
        stacked: n, if the model hands its layers [n, batch, sequence, hidden], as AltUp does in
            Gemma 3n; 0 if it hands them [batch, sequence, hidden].
        shared: what layers share. It is zero until a layer has computed it.
    """

    hidden: int
    stacked: int = 0
    shared: tuple[Shared, ...] = ()

    @property
    def width(self) -> int:
        """The number of columns that hidden states take."""
        return max(1, self.stacked) * self.hidden

    def states(self, packed: Tensor) -> Tensor:
        """The columns of the hidden states."""
        return packed[..., : self.width]

    def pack(self, hidden: Tensor, shared: Mapping[str, States]) -> Tensor:
        """One tensor from what a layer returned and what has been shared so far."""
        parts = [hidden.permute(1, 2, 0, 3).flatten(2) if self.stacked else hidden]
        batch, length = parts[0].shape[:2]
        for one in self.shared:
            if one.key in shared:
                parts += [x.transpose(1, 2).flatten(2) for x in shared[one.key]]
            else:
                parts.append(parts[0].new_zeros(batch, length, sum(map(prod, one.sizes))))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0].contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, dict[str, States]]:
        """The hidden states as a layer takes them, and what has been shared so far."""
        hidden = self.states(packed)
        if self.stacked:
            hidden = hidden.unflatten(-1, (self.stacked, self.hidden)).permute(2, 0, 1, 3)
        columns = self.columns(packed)
        shared = {
            one.key: tuple(
                next(columns).unflatten(-1, size).transpose(1, 2).contiguous() for size in one.sizes
            )
            for one in self.shared
        }
        return hidden.contiguous(), shared

    def columns(self, packed: Tensor) -> Iterator[Tensor]:
        """The columns of each shared tensor."""
        start = self.width
        for size in (size for one in self.shared for size in one.sizes):
            yield packed[..., start : start + prod(size)]
            start += prod(size)


def carried_of(
    hidden: Tensor, tokens: torch.Size, found: Mapping[str, States], where: str
) -> Carried | None:
    """The columns for a model; None if its layers take one hidden state for each token, no more.

    Args:
        hidden: the input of its first layer.
        tokens: the shape [batch, sequence] of the tokens behind it.
        found: what its layers share, by name in the model's dictionary.
        where: the model, for messages.

    Raises:
        ArchitectureError: hidden states or shared tensors have another form.
    """
    if hidden.ndim == 3 and not found:
        return None
    stacked = hidden.shape[0] if hidden.ndim == 4 and hidden.shape[1:3] == tokens else 0
    if not stacked and (hidden.ndim != 3 or hidden.shape[:2] != tokens):
        raise ArchitectureError(
            f"{where} gives its layers hidden states of shape {tuple(hidden.shape)} for "
            f"{tokens[0]} windows of {tokens[1]} tokens",
            remedy="this family cannot be pruned layer by layer yet",
        )
    for key, tensors in found.items():
        for x in tensors:
            if x.ndim != 4 or (x.shape[0], x.shape[2]) != tokens:
                raise ArchitectureError(
                    f"layers of {where} share a tensor of shape {tuple(x.shape)} ({key})",
                    remedy="this family cannot be pruned layer by layer yet",
                )
    shared = tuple(
        Shared(key, tuple((x.shape[1], x.shape[3]) for x in tensors))
        for key, tensors in found.items()
    )
    return Carried(hidden.shape[-1], stacked, shared)
