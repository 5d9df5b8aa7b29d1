"""The losses between two models, and their gradients: of predictions, and of hidden states.

Let z be the logits of the student, q = softmax(z / T), and p the teacher's distribution at the
same temperature T. All losses are per token and multiplied by T²:

    forward    KL(p ‖ q) = Σ p (log p − log q)         gradient T (q − p)
    reverse    KL(q ‖ p) = Σ q (log q − log p)         gradient T q (log q − log p − KL(q ‖ p))
    total_variation   ½ Σ |p − q|                      gradient T q (s − Σ q s),  s = ½ sign(q − p)

1 − total variation is the probability that a draft's token is accepted. Forward KL makes the
student cover every token that the teacher could choose. Reverse KL concentrates it on the teacher's
likely tokens. The factor T² keeps the gradients as large as at T = 1. Papers: Hinton et al. 2015,
arXiv:1503.02531 (forward, T²); Gu et al. 2023, "MiniLLM", arXiv:2306.08543 (reverse); Zhou et al.
2023, "DistillSpec", arXiv:2310.08461 (total variation). Everything is in float32.

With a vocabulary of fifty thousand, the logits of a batch and their float32 copies are the largest
tensors of a training. This module computes the logits of a few tokens, overwrites them with the
gradient of the loss, and keeps only the gradients of the head and of the hidden state:

    for some tokens:  Z = H Wᵀ;   G = ∂L/∂Z;   ∂L/∂H = G W;   ∂L/∂W += Gᵀ H

Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989, do the same for cross entropy.

A student may also learn the hidden states of a teacher, layer by layer:

    loss = mean over pairs (i, j) of   Σ ‖h_i − g_j‖² / Σ ‖g_j‖²        sums over the tokens

h_i is the output of the student's decoder layer i, and g_j the output of the teacher's layer j.
The division by the size of g_j gives all layers the same weight.

Paper: Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models"
(SquareHead), arXiv:2310.06927.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import RecipeError
from secateur.machine import logits_block

KINDS = ("forward", "reverse", "total_variation")
LEAST = -1e4
"""Replaces log p of impossible tokens, so that 0 · log 0 is 0. Its exponential is 0 in float32."""


Rows = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Which tokens of a batch, and their float32 logits [tokens, vocabulary], which may be overwritten
→ the sum of their losses divided by the number of all tokens, and its gradient."""


def next_token_rows(targets: Tensor, count: float) -> Rows:
    """−log q of the next token: the usual loss of language models.

    Args:
        targets: the next token of each; −100 where there is none.
        count: number of tokens that have a next token.

    Example:
        >>> import torch
        >>> from secateur.training.divergences import next_token_rows
        >>> rows = next_token_rows(torch.tensor([0]), count=1)
        >>> rows(slice(0, 1), torch.zeros(1, 2))
        (tensor(0.6931), tensor([[-0.5000,  0.5000]]))
    """

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens = targets[rows]
        there = tokens >= 0
        places = tokens.clamp(min=0)[:, None]
        log_q = logits.log_softmax(-1)
        loss = -(log_q.gather(1, places)[:, 0] * there).sum()
        # ∂L/∂z = q − 1 at the next token; rows without one become 0 by the product below
        gradient = log_q.exp_()
        gradient.scatter_add_(1, places, gradient.new_full(places.shape, -1.0))
        gradient.mul_((there / count)[:, None])
        return loss / count, gradient

    return of


def divergence_rows(
    kind: str,
    temperature: float,
    count: float,
    expected: Callable[[slice, Tensor], Tensor],
    counted: Tensor | None = None,
) -> Rows:
    """The divergence of the student from the teacher.

    Args:
        kind: one of `KINDS`.
        temperature: T.
        count: number of all tokens.
        expected: rows and log q → log p, float32 [tokens, vocabulary]. Where only a part of p is
            known, the remaining probability may be distributed as in q. The gradients then equal
            those of the divergence that treats all remaining tokens as one outcome.
        counted: which tokens count, bool [tokens]; None if all.
    """

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits.div_(temperature).log_softmax(-1).clamp_(min=LEAST)
        log_p = expected(rows, log_q).clamp_(min=LEAST)
        # From here on everything is written over what is no longer read: a row is one vocabulary.
        apart = log_q - log_p
        p, q = log_p.exp_(), log_q.exp_()
        if counted is not None:  # a token that does not count: the same distribution, apart by 0
            apart.mul_(counted[rows, None])
            p = p.where(counted[rows, None], q)
        if kind == "forward":
            loss = -torch.dot(p.flatten(), apart.flatten())
            gradient = q.sub_(p)
        elif kind == "total_variation":
            # s = ½ sign(q − p), and log is monotone, so the sign is that of log q − log p
            signs = apart.sign_().div_(2)
            loss = torch.dot(signs.flatten(), (q - p).flatten())
            each = signs.mul_(q)
            gradient = each.addcmul_(q, each.sum(-1, keepdim=True), value=-1.0)
        else:
            # q (log q − log p); its sum over the vocabulary is KL(q ‖ p) of the token
            each = apart.mul_(q)
            sums = each.sum(-1, keepdim=True)
            loss, gradient = sums.sum(), each.addcmul_(q, sums, value=-1.0)
        return loss * (temperature**2 / count), gradient.mul_(temperature / count)

    return of


def forward_and_next_token_rows(
    expected: Callable[[slice, Tensor], Tensor],
    targets: Tensor,
    counts: tuple[int, float],
    share: float,
) -> Rows:
    """(1 − share) · the forward divergence at T = 1 + share · the next-token loss, in one pass.

    Args:
        expected: as in `divergence_rows`.
        targets: as in `next_token_rows`.
        counts: number of all tokens, and of those that have a next token.
        share: of the next-token loss.
    """
    taught = (1 - share) / counts[0]

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        there = (targets[rows] >= 0) * (share / counts[1])
        places = targets[rows].clamp(min=0)[:, None]
        log_q = logits.log_softmax(-1).clamp_(min=LEAST)
        plain = -torch.dot(log_q.gather(1, places)[:, 0], there)
        log_p = expected(rows, log_q).clamp_(min=LEAST)
        apart = log_q - log_p
        p = log_p.exp_()
        # gradient: taught · (q − p) + there · (q − 1 at the next token), with q computed once
        loss = plain - taught * torch.dot(p.flatten(), apart.flatten())
        gradient = log_q.exp_().mul_((taught + there)[:, None]).sub_(p, alpha=taught)
        return loss, gradient.scatter_add_(1, places, -there[:, None])

    return of


CHUNKS = 64
"""So many parts of a block of logits become float32 one after the other. A part, 1 MiB, should fit
in the cache of a processor."""


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

    with _instead(head, lambda hidden: loss_of_hidden(hidden, head, rows)):
        loss: Tensor = model(input_ids=ids, use_cache=False).logits
    return loss


def loss_of_hidden(hidden: Tensor, head: nn.Linear, rows: Rows) -> Tensor:
    """Return the differentiable loss from what an output head reads [windows, length, width]."""
    loss: Tensor = _OfHead.apply(hidden.flatten(0, -2), head.weight, head.bias, rows)
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
        # cast once, because autocast would cast the whole head again for every block of tokens
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        to_hidden = torch.empty_like(hidden) if of_hidden else None
        to_weight = None
        to_bias = torch.zeros_like(bias) if bias is not None and of_bias else None
        loss = torch.zeros((), device=hidden.device)
        size = max(1, logits_block(hidden.device) // (len(weight) * matrix.itemsize))
        for start in range(0, len(hidden), size):
            some = inputs[start : start + size]
            # Z = H Wᵀ [tokens, vocabulary], overwritten by ∂L/∂Z in `_in_chunks`
            gradient = some @ matrix.t()
            if bias is not None:
                gradient += bias.to(dtype)
            loss += _in_chunks(gradient, start, rows)
            if to_hidden is not None:
                to_hidden[start : start + size] = gradient @ matrix
            if of_weight:
                # the first product is the accumulator, so no zeros as large as the head are made
                product = gradient.t() @ some
                to_weight = (
                    product.to(weight.dtype) if to_weight is None else to_weight.add_(product)
                )
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=to_bias.dtype)
            del gradient  # or there were two blocks
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
    size = max(1, logits_block(logits.device) // CHUNKS // (4 * logits.shape[1]))
    for first in range(0, len(logits), size):
        chunk = logits[first : first + size]
        place = slice(start + first, start + first + len(chunk))
        # a copy in any case: `rows` overwrites it, and float32 logits would be `chunk` itself
        part, gradient = rows(place, chunk.to(torch.float32, copy=True))
        loss += part
        chunk.copy_(gradient)
    return loss


Pairs = tuple[tuple[int, int], ...]


def layer_pairs(student: int, teacher: int, kept: Sequence[int] | None = None) -> Pairs:
    """Pair each layer of the student with the layer of the teacher that it learns from.

    A kept layer replaces the cut layers that followed it. Its output should equal the input of the
    next kept layer in the teacher.

    Args:
        student: number of decoder layers of the student.
        teacher: number of decoder layers of the teacher.
        kept: the teacher's layers that the student has; None spaces them evenly.

    Raises:
        RecipeError: the student has more layers.
    """
    if student > teacher:
        raise RecipeError(
            f"the student has {student} layers, the teacher {teacher}",
            remedy="name the larger model as the teacher",
        )
    if kept is None:
        # the last layers of both are always a pair: i = student − 1 gives teacher − 1
        return tuple((i, -(-(i + 1) * teacher // student) - 1) for i in range(student))
    return tuple(enumerate([*(k - 1 for k in kept[1:]), teacher - 1]))


@contextmanager
def outputs_of(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """A context that keeps the outputs of decoder layers, by number."""
    seen: dict[int, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Any, *, number: int) -> None:
        seen[number] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for number, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(keep, number=number)))
        yield seen


def hidden_loss(
    student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], pairs: Pairs
) -> Tensor:
    """Return the loss of a batch, float32.

    Raises:
        RecipeError: the hidden states have different widths.
    """
    total = torch.zeros(())
    for i, j in pairs:
        own, target = student[i].float(), teacher[j].float()
        if own.shape != target.shape:
            raise RecipeError(
                f"hidden states of width {own.shape[-1]} cannot be compared with those of the "
                f"teacher, {target.shape[-1]}",
                remedy="leave the hidden loss out",
            )
        total = total.to(own.device) + (own - target).square().sum() / target.square().sum()
    return total / max(len(pairs), 1)
