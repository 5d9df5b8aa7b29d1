"""The loss of a language model without its logits: the output head is applied to a few tokens.

A vocabulary of fifty thousand makes the logits of a batch, and two or three copies of them in
float32, the largest tensors of all. Here logits are made for some tokens, the gradient of the loss
is written over them, and what has to be kept of it is only what the head and the hidden state get:

    for some tokens:  Z = H Wᵀ;   G = ∂L/∂Z;   ∂L/∂H = G W;   ∂L/∂W += Gᵀ H

The same is done to cross entropy by Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.training.divergences import Rows

__all__ = ["head_alone", "last_hidden", "loss_of", "through_head"]

BLOCK_BYTES = 64 * 2**20
"""Of the logits that are made by one product, in the dtype of the product."""
CHUNK_BYTES = 1 * 2**20
"""Of the rows of them that are in float32 at a time: they should stay in a cache."""
PROBE_TOKENS = 8


def head_alone(model: Any) -> nn.Linear | None:
    """The output head, if the model's logits are just what it gives; None if they are not.

    Some families scale or cap what their head gives; so it is tried out on a few tokens.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        return None
    given: list[Tensor] = []
    handle = head.register_forward_hook(lambda *call: given.append(call[2]))
    try:
        with torch.no_grad():
            ids = torch.arange(PROBE_TOKENS, device=head.weight.device) % head.out_features
            logits = model(input_ids=ids[None], use_cache=False).logits
    finally:
        handle.remove()
    return head if len(given) == 1 and torch.equal(given[0], logits) else None


def loss_of(model: Any, head: nn.Linear | None, ids: Tensor, rows: Rows) -> Tensor:
    """The loss of a batch, which can be differentiated.

    Args:
        model: a causal language model.
        head: from `head_alone`; None where all logits have to be made.
        ids: token ids [windows, length].
        rows: the loss of some of the windows · length tokens.
    """
    if head is None:
        logits = model(input_ids=ids, use_cache=False).logits
        return _OfLogits.apply(logits.flatten(0, -2), rows)

    def of(hidden: Tensor) -> Tensor:
        return _OfHead.apply(hidden.flatten(0, -2), head.weight, head.bias, rows)

    with _instead(head, of):
        loss: Tensor = model(input_ids=ids, use_cache=False).logits
    return loss


def last_hidden(model: Any, head: nn.Linear | None, ids: Tensor) -> Tensor:
    """What the head gets, or the logits if that is not all there is to them; [tokens, width]."""
    if head is None:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, -2)
    with _instead(head, lambda hidden: hidden):
        hidden: Tensor = model(input_ids=ids, use_cache=False).logits
    return hidden.flatten(0, -2)


def through_head(head: nn.Linear | None, hidden: Tensor) -> Tensor:
    """The logits of some tokens, float32, from what `last_hidden` gave for them."""
    if head is None:
        return hidden.float()
    return functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()


@contextmanager
def _instead(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head does something else for a while.

    It is called as ever, so whatever hangs on its call (sharded weights gathered) still happens.
    """
    head.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward


class _OfHead(torch.autograd.Function):
    """The loss from the last hidden states; its gradients are made along with it."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows
    ) -> Tensor:
        """Args: what the head gets [tokens, width], its weight and bias, the loss of rows."""
        of_hidden, of_weight, of_bias = context.needs_input_grad[:3]
        kind = hidden.device.type
        fast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if fast else hidden.dtype
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        to_hidden = torch.empty_like(hidden) if of_hidden else None
        to_weight = None
        to_bias = torch.zeros_like(bias) if bias is not None and of_bias else None
        loss = torch.zeros((), device=hidden.device)
        size = max(1, BLOCK_BYTES // (len(weight) * matrix.itemsize))
        for start in range(0, len(hidden), size):
            some = inputs[start : start + size]
            gradient = some @ matrix.t()
            if bias is not None:
                gradient += bias.to(dtype)
            loss += _in_chunks(gradient, start, rows)
            if to_hidden is not None:
                to_hidden[start : start + size] = gradient @ matrix
            if of_weight:
                product = gradient.t() @ some
                to_weight = (
                    product.to(weight.dtype) if to_weight is None else to_weight.add_(product)
                )
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=to_bias.dtype)
        context.save_for_backward(*(x for x in (to_hidden, to_weight, to_bias) if x is not None))
        context.there = [x is not None for x in (to_hidden, to_weight, to_bias)]
        return loss

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Everything is there already, up to a factor."""
        saved = iter(context.saved_tensors)
        return (*(next(saved).mul_(upstream) if x else None for x in context.there), None)


class _OfLogits(torch.autograd.Function):
    """The loss from logits; only its gradient is as large as they are."""

    @staticmethod
    def forward(context: Any, logits: Tensor, rows: Rows) -> Tensor:
        """Args: logits [tokens, vocabulary], the loss of rows."""
        gradient = logits.detach().clone()
        loss = _in_chunks(gradient, 0, rows)
        context.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Everything is there already, up to a factor."""
        (gradient,) = context.saved_tensors
        return gradient.mul_(upstream), None


def _in_chunks(logits: Tensor, start: int, rows: Rows) -> Tensor:
    """The loss of logits, which are overwritten by its gradient; the first is of token `start`."""
    loss = torch.zeros((), device=logits.device)
    size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    for first in range(0, len(logits), size):
        chunk = logits[first : first + size]
        place = slice(start + first, start + first + len(chunk))
        part, gradient = rows(place, chunk.to(torch.float32, copy=True))
        loss += part
        chunk.copy_(gradient)
    return loss
