"""The loss of a language model without all logits in memory at once.

With a vocabulary of fifty thousand, the logits of a batch and their float32 copies are the largest
tensors of a training. This module computes the logits of a few tokens, overwrites them with the
gradient of the loss, and keeps only the gradients of the head and of the hidden state:

    for some tokens:  Z = H Wᵀ;   G = ∂L/∂Z;   ∂L/∂H = G W;   ∂L/∂W += Gᵀ H

Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, do the same for cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.training.divergences import Rows

BLOCK_BYTES = 64 * 2**20
"""Size of the logits that one product computes, in the dtype of the product."""
CHUNK_BYTES = 1 * 2**20
"""Size of the rows in float32 at one time. They should fit in a cache."""
PROBE_TOKENS = 8


def head_alone(model: Any) -> nn.Linear | None:
    """Return the output head if its output is exactly the model's logits, else None.

    Some families scale or cap the output of the head, so the function checks a few tokens.
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
    """Return the differentiable loss of a batch.

    Args:
        model: a causal language model.
        head: the result of `head_alone`; None if the model must compute all logits.
        ids: token ids [windows, length].
        rows: computes the loss of some of the windows · length tokens.
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
    """Return the input of the head, or the logits if there is no head; [tokens, width]."""
    if head is None:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, -2)
    with _instead(head, lambda hidden: hidden):
        hidden: Tensor = model(input_ids=ids, use_cache=False).logits
    return hidden.flatten(0, -2)


def through_head(head: nn.Linear | None, hidden: Tensor) -> Tensor:
    """Return the float32 logits of some tokens from the result of `last_hidden`."""
    if head is None:
        return hidden.float()
    return functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()


@contextmanager
def _instead(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the forward of the head inside the context.

    The model still calls the head, so hooks on that call (gathering sharded weights) still run.
    """
    head.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward


class _OfHead(torch.autograd.Function):
    """The loss from the last hidden states. The forward also computes the gradients."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows
    ) -> Tensor:
        """Args: the input of the head [tokens, width], its weight and bias, the loss of rows."""
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
    """The loss from logits. Only its gradient is as large as the logits."""

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
    """Return the loss of logits, overwritten by its gradient. The first row is token `start`."""
    loss = torch.zeros((), device=logits.device)
    size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    for first in range(0, len(logits), size):
        chunk = logits[first : first + size]
        place = slice(start + first, start + first + len(chunk))
        part, gradient = rows(place, chunk.to(torch.float32, copy=True))
        loss += part
        chunk.copy_(gradient)
    return loss
