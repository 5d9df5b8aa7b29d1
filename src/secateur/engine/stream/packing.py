"""Everything that goes from layer to layer, packed into one tensor with a row for each token.

In most models it is the hidden state. Some models have several hidden states for each token, or
layers that read keys and values of an earlier layer. With all of it in one tensor, whatever stores,
shares or differentiates hidden states works with these models as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from secateur.errors import ArchitectureError

States = tuple[Tensor, ...]
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedHiddenStates:
    """The columns of the packed tensor [batch, sequence, width]:

        hidden states 1 | … | hidden states n | keys, values of one kind of layer | …

    Attributes:
        hidden: the hidden size.
        stacked: n, if the model hands its layers [n, batch, sequence, hidden], as AltUp does in
            Gemma 3n; 0 if it hands them [batch, sequence, hidden].
        shared: what one layer computes and later layers read, such as keys and values: by the name
            in the model's dictionary, (heads, head_dim) of each tensor [batch, heads, sequence,
            head_dim]. It is zero until a layer has computed it.
    """

    hidden: int
    stacked: int = 0
    shared: Mapping[str, Sizes] = field(default_factory=dict)

    @classmethod
    def of(
        cls, hidden: Tensor, tokens: torch.Size, found: Mapping[str, States], where: str
    ) -> PackedHiddenStates:
        """The columns for a model whose layers take more than one hidden state for each token.

        Args:
            hidden: what its first layer takes.
            tokens: (windows, tokens of a window).
            found: what its layers share.
            where: the model, for the error.

        Raises:
            ArchitectureError: a tensor has no row for each token.
        """
        stacked = hidden.shape[0] if hidden.ndim == 4 and hidden.shape[1:3] == tokens else 0
        odd = [] if stacked or hidden.shape[:-1] == tokens else [("hidden states", hidden)]
        shared_ones = [(key, x) for key, tensors in found.items() for x in tensors]
        odd += [(k, x) for k, x in shared_ones if x.ndim != 4 or (x.shape[0], x.shape[2]) != tokens]
        if odd:
            what, x = odd[0]
            raise ArchitectureError(
                f"{where} gives its layers {what} of shape {tuple(x.shape)} for {tokens[0]} "
                f"windows of {tokens[1]} tokens",
                remedy="this family cannot be pruned layer by layer yet",
            )
        shared = {
            key: tuple((x.shape[1], x.shape[3]) for x in tensors) for key, tensors in found.items()
        }
        return cls(hidden.shape[-1], stacked, shared)

    @property
    def width(self) -> int:
        """The number of columns that hidden states take."""
        return max(1, self.stacked) * self.hidden

    def states(self, packed: Tensor) -> Tensor:
        """The columns of the hidden states."""
        return packed[..., : self.width]

    def pack(self, hidden: Tensor, shared: Mapping[str, States]) -> Tensor:
        """One tensor from what a layer returned and what has been shared so far."""
        # [stacked, batch, sequence, hidden] → [batch, sequence, stacked · hidden]
        parts = [hidden.permute(1, 2, 0, 3).flatten(2) if self.stacked else hidden]
        batch, length = parts[0].shape[:2]
        for key, sizes in self.shared.items():
            if key in shared:
                # [batch, heads, sequence, head_dim] → [batch, sequence, heads · head_dim]
                parts += [x.transpose(1, 2).flatten(2) for x in shared[key]]
            else:
                parts.append(parts[0].new_zeros(batch, length, sum(map(prod, sizes))))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0].contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, dict[str, States]]:
        """The hidden states as a layer takes them, and what has been shared so far."""
        hidden = self.states(packed)
        if self.stacked:
            hidden = hidden.unflatten(-1, (self.stacked, self.hidden)).permute(2, 0, 1, 3)
        columns = self.columns(packed)
        shared = {
            key: tuple(
                next(columns).unflatten(-1, size).transpose(1, 2).contiguous() for size in sizes
            )
            for key, sizes in self.shared.items()
        }
        return hidden.contiguous(), shared

    def columns(self, packed: Tensor) -> Iterator[Tensor]:
        """The columns of each shared tensor."""
        start = self.width
        for size in (size for sizes in self.shared.values() for size in sizes):
            yield packed[..., start : start + prod(size)]
            start += prod(size)
