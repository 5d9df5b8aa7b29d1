"""The losses of a training: the next-token loss, or the divergence from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.registry import did_you_mean
from secateur.training.batches import Batch
from secateur.training.divergences import (
    KINDS,
    HiddenStateRecorder,
    Rows,
    divergence_rows,
    head_alone,
    hidden_loss,
    layer_pairs,
    loss_of,
    next_token_rows,
)
from secateur.training.teachers import Teacher, vocabulary_of


class Objective(Protocol):
    """A loss: the mean over the tokens of a batch."""

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the differentiable loss of a batch, float32."""
        ...


@dataclass(frozen=True)
class NextToken:
    """loss = mean_t −log q_t(the token after t), in nats: the usual loss of language models.

    Args:
        head: the model's output head, if its output is exactly the logits; see `heads.py`.
    """

    head: nn.Linear | None

    @classmethod
    def of(cls, model: Any) -> NextToken:
        """Make the objective for a model. All processes that share it must call this together."""
        return cls(head_alone(model))

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        return loss_of(model, self.head, batch.ids, _next_tokens(batch.ids))


@dataclass(frozen=True)
class Distil:
    """loss = (1 − next_token) · T² · divergence(p, q) + next_token · next-token loss
                                                        + hidden · distance of hidden states

    The divergence is the mean over all tokens. `divergences.py` and `hidden.py` define the terms.

    Papers: Hinton et al. 2015, arXiv:1503.02531; for pruned and cut models Muralidharan et al.
    2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
    arXiv:2407.14679, where the forward divergence alone was best; SquareHead, arXiv:2310.06927.

    Args:
        head: the student's output head; see `NextToken`.
        teacher: the model to learn from.
        kind: forward, reverse or symmetric.
        temperature: T.
        next_token: share of the next-token loss, 0 to 1.
        hidden: weight of the loss of hidden states; 0 for none.
        pairs: pairs of a student layer and the teacher layer it learns from, if hidden is not 0.
    """

    head: nn.Linear | None
    teacher: Teacher
    kind: str = "forward"
    temperature: float = 1.0
    next_token: float = 0.0
    hidden: float = 0.0
    pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(
                f"unknown divergence {self.kind!r}", remedy=did_you_mean(self.kind, [*KINDS])
            )
        if not self.temperature > 0:
            raise RecipeError(f"temperature {self.temperature}", remedy="1 is usual, up to 4")
        if not 0 <= self.next_token <= 1 or self.hidden < 0:
            raise RecipeError(
                f"share of the next-token loss {self.next_token}, weight of hidden {self.hidden}",
                remedy="give a share from 0 to 1 and a weight of 0 or more",
            )

    @classmethod
    def between(
        cls,
        student: Any,
        teacher: Teacher,
        *,
        teacher_depth: int = 0,
        teacher_layers: Sequence[int] | None = None,
        hidden: float = 0.0,
        **options: Any,
    ) -> Distil:
        """Make the objective for a student. All processes that share it must call this together.

        Args:
            student: a causal language model.
            teacher: the model to learn from.
            teacher_depth: number of its decoder layers; needed if `hidden` is not 0.
            teacher_layers: the teacher's layers that the student has; see `layer_pairs`.
            hidden: weight of the loss of hidden states.
            **options: the other fields.

        Raises:
            RecipeError: the vocabularies differ, or the two models cannot be compared.
        """
        own = vocabulary_of(student)
        if own != teacher.vocabulary:
            raise RecipeError(
                f"the student has {own} tokens, the teacher {teacher.vocabulary}",
                remedy="a teacher needs the vocabulary of the student: name the model that it "
                "was made from",
            )
        pairs: tuple[tuple[int, int], ...] = ()
        if hidden:
            layers = len(describe(student).layers(student))
            pairs = layer_pairs(layers, teacher_depth, teacher_layers)
        return cls(head_alone(student), teacher, hidden=hidden, pairs=pairs, **options)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        taught = self.teacher(batch, self.temperature, [j for _, j in self.pairs])
        count = batch.ids.numel()
        rows = divergence_rows(self.kind, self.temperature, count, taught.expected)
        if self.next_token:
            rows = _blend(rows, _next_tokens(batch.ids), self.next_token)
        if not self.pairs:
            return loss_of(model, self.head, batch.ids, rows)
        layers = describe(model).layers(model)
        with HiddenStateRecorder({i: layers[i] for i, _ in self.pairs}) as recorder:
            loss = loss_of(model, self.head, batch.ids, rows)
        return loss + self.hidden * hidden_loss(recorder.seen, taught.hidden, self.pairs)


def _next_tokens(ids: Tensor) -> Rows:
    """Return the next-token loss of a batch. The last token of a window has no next token."""
    targets = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], dim=1)
    return next_token_rows(targets.flatten(), ids.numel() - len(ids))


def _blend(one: Rows, other: Rows, share: float) -> Rows:
    """Return (1 − share) · the first loss + share · the second."""

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = other(rows, logits.clone())
        first, slope = one(rows, logits)
        return first.lerp(loss, share), slope.lerp_(gradient, share)

    return of
