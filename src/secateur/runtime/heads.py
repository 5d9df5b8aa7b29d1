"""Decodes a draft head (`models.draft_head`): one layer, which reads its parent's states.

Position t of the head has two vectors: the embedding of the token of position t + 1, and h. Where
the parent has computed position t, h = fc(its states). Further on in a chain, h is what the layer
gave at the position before, ahead of the last norm. `csrc/decode.h` has the formula of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.models.draft_head import DraftHead
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import quantize_rows
from secateur.runtime.decode import SlotDecoder, Token
from secateur.runtime.formats import BITS, GRID_BITS, VALUES
from secateur.runtime.kernels.linear import PackedLinear
from secateur.runtime.kernels.matrix import KernelMatrix, to_large_pages

GROUP = 32
"""Weights of a row that share a scale, where matrices of a head have 4 bits."""


class HeadDecoder(SlotDecoder):
    """Decodes up to eight tokens of chains of several texts with one call.

    `give` has the parent's states at the next positions of a slot. A token beyond them reads what
    the layer gave at the position before. `proposer` is the head with its matrices as stored here.

    Args:
        head: what is decoded.
        parent: decodes its parent, and gives its states from here on; the head gets as many slots
            of the same length.
        values: how the head's matrices are stored: `float32`, `bfloat16`, `int8` or `int4`. `fc` is
            bfloat16 where others are integers, because a few numbers of a state are much larger
            than the rest.
    """

    def __init__(self, head: DraftHead, parent: SlotDecoder, values: str = "int8") -> None:
        parent.tap(head.taps)
        model = _StoredHead(head, parent.model.get_input_embeddings(), values)
        super().__init__(model, parent.capacity, len(parent.lengths), taps=(1,))
        self.proposer, self.embed, self.tokens = model.model, model.embed, len(head.ids)
        layer, norm = self.c.layer[0], self._kernel_model.norm(model.model.layers[0].hidden_norm)
        self.c.token_norm, layer.attention_in = layer.attention_in, norm
        self.vocabulary = parent.vocabulary  # of the tokens that it reads
        self._given = [(0, torch.empty(0, self.c.hidden))] * len(self.lengths)

    def give(self, slot: int, states: Float[Tensor, "tokens taps hidden"]) -> None:
        """Say what the parent's states at the next positions of a slot are."""
        self.take_states(slot)  # its own, which no chain goes on with
        self._given[slot] = self.lengths[slot], states.flatten(1)

    def _embedded(self, tokens: Sequence[Token]) -> Tensor:
        """What the layer reads [tokens, 2 · hidden], float32."""
        hidden, known, states = torch.empty(len(tokens), self.c.hidden), [], []
        for number, (slot, position, _, _) in enumerate(tokens):
            first, given = self._given[slot]
            if position - first < len(given):
                known.append(number)
                states.append(given[position - first])
            else:
                hidden[number] = self._states[slot][-1][0]
        with torch.inference_mode():
            if known:
                hidden[known] = self.model.model.fc(torch.stack(states))
            return torch.cat([super()._embedded(tokens), hidden], 1)


class _StoredHead(nn.Module):
    """A head in the form of a model of transformers, with matrices for kernels.

    Args:
        head: stays as it is.
        embed: the parent's embedding.
        values: of the matrices.
    """

    def __init__(self, head: DraftHead, embed: nn.Module, values: str) -> None:
        super().__init__()
        self.config, self.embed, self.model = head.config, embed, copy.deepcopy(head)
        self.model.rotary_emb = self.model.rotary
        for name, linear in [*self.model.named_modules()]:
            if isinstance(linear, nn.Linear):
                kept = "bfloat16" if linear is self.model.fc and values in BITS else values
                self.model.set_submodule(name, PackedLinear(_matrix(linear.weight.detach(), kept)))
        to_large_pages(x.matrix for x in self.model.modules() if isinstance(x, PackedLinear))

    def get_input_embeddings(self) -> nn.Module:
        """The parent's."""
        return self.embed

    def get_output_embeddings(self) -> Any:
        """Of the tokens that the head proposes."""
        return self.model.lm_head


def _matrix(weight: Tensor, values: str) -> KernelMatrix:
    """A matrix [out, in], rounded to the nearest."""
    if values == "int8":
        codes, scale = quantize_rows(weight.float())
        return KernelMatrix(codes, scale=scale)
    if values in GRID_BITS:
        return KernelMatrix.of_codes(*GroupGrid(4, GROUP).quantize(weight.float()), GROUP)
    return KernelMatrix(weight.to(VALUES[values]).contiguous())
