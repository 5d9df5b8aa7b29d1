"""The losses of a training: the next-token loss, or the divergence from a teacher.

A teacher is a model in memory, or a file of its predictions. A model in memory runs once for every
batch. A file stores, for every token, the k most likely next tokens with their log probabilities,
and the remaining probability of all others together. With a file, only the student is in memory,
and the teacher reads a text once for any number of epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.machine import fast_matmuls, logits_block
from secateur.models.architecture import describe, head_alone, vocabulary_of
from secateur.models.checkpoint import ShardWriter
from secateur.training import divergences
from secateur.training.batches import Batch
from secateur.training.divergences import Rows, loss_of, outputs_of

Expected = Callable[[slice, Tensor], Tensor]
"""Rows and log q of the student → log p of the teacher, float32 [tokens, vocabulary]."""

Taught = tuple[Expected, dict[int, Tensor]]
"""The predictions of a teacher for a batch, and outputs of its decoder layers by number."""

TOP_K = 64
"""Default number of most likely tokens to store from a teacher."""


class Teacher(Protocol):
    """Predicts the next token of every token in a batch."""

    vocabulary: int

    def __call__(self, batch: Batch, temperature: float, layers: Sequence[int]) -> Taught:
        """Return the predictions for a batch, and the outputs of some decoder layers."""
        ...


class ModelTeacher:
    """A teacher in memory. It does not learn.

    Args:
        model: a causal language model in eval mode, on the device of the student.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)
        self.head = head_alone(model)
        self.vocabulary = vocabulary_of(model)

    def __call__(self, batch: Batch, temperature: float, layers: Sequence[int]) -> Taught:
        """See `Teacher`."""
        with torch.no_grad(), fast_matmuls(batch.ids.device):
            blocks = describe(self.model).layers(self.model) if layers else ()
            with outputs_of({n: blocks[n] for n in layers}) as hidden:
                states = divergences.last_hidden(self.model, self.head, batch.ids)
        size = max(1, logits_block(states.device) // (4 * self.vocabulary))
        block, logits = slice(0, 0), states

        def expected(rows: slice, log_q: Tensor) -> Tensor:
            # The student asks for a few rows at a time, in order. One product of the head for many
            # rows is faster, so its logits are kept until the rows leave the block.
            nonlocal block, logits
            if not block.start <= rows.start <= rows.stop <= block.stop:
                block, logits = slice(rows.start, max(rows.start + size, rows.stop)), states[:0]
                with fast_matmuls(states.device):
                    logits = divergences.through_head(self.head, states[block])
            own = logits[rows.start - block.start : rows.stop - block.start]
            return (own / temperature).log_softmax(-1)

        return expected, hidden


class WrittenTeacher:
    """The k most likely tokens at every position, from a file that `write_teacher` wrote.

    The remaining probability is one outcome, "any other token". It is distributed as in the
    student, so the student learns nothing about its distribution; see `divergence_rows`.

    Args:
        file: predictions for the windows that the student reads, in the same order.
    """

    def __init__(self, file: Path) -> None:
        self.stored = safe_open(file, framework="pt")
        self.vocabulary = int(self.stored.metadata()["vocabulary"])

    def __call__(self, batch: Batch, temperature: float, layers: Sequence[int]) -> Taught:
        """See `Teacher`. The temperature is that of the file, and there are no hidden states."""
        device = batch.ids.device
        known, rest, tokens = (self.read(part, batch.numbers).to(device) for part in PARTS)
        # float16 lost a little: the softmax makes the k + 1 outcomes sum to 1 again
        joint = torch.cat([known, rest[:, None]], -1).log_softmax(-1)

        def expected(rows: slice, log_q: Tensor) -> Tensor:
            places, log_p = tokens[rows].long(), joint[rows]
            # log of the student's probability of all tokens that the file does not name
            left = log_q.scatter(1, places, -torch.inf).logsumexp(-1, keepdim=True)
            return (log_q + (log_p[:, -1:] - left)).scatter_(1, places, log_p[:, :-1])

        return expected, {}

    def read(self, part: str, numbers: Sequence[int]) -> Tensor:
        """Return one stored tensor for some windows, in float32 or int64."""
        read = [self.stored.get_tensor(f"{n}/{part}") for n in numbers]
        return torch.cat([x.float() if x.is_floating_point() else x for x in read])


PARTS = ("log_p", "rest", "tokens")


def write_teacher(
    teacher: Teacher,
    windows: Tensor,
    file: Path,
    *,
    k: int,
    device: torch.device,
    temperature: float = 1.0,
    on_window: Callable[[], None] = lambda: None,
    writes: bool = True,
) -> None:
    """Write a model's predictions for every token of windows, with one window in memory.

    Args:
        teacher: the teacher.
        windows: token ids [windows, length].
        file: the result. It is complete, or it does not exist.
        k: number of most likely tokens to keep, 6 bytes for each; log p is in float16.
        device: where the teacher computes.
        temperature: temperature of the distillation.
        on_window: called after every window.
        writes: False for a process that runs its part of the model but writes nothing.

    Raises:
        RecipeError: k is not between 1 and the vocabulary size − 1.
    """
    if not 0 < k < teacher.vocabulary:
        raise RecipeError(
            f"the {k} most likely of {teacher.vocabulary} tokens", remedy="64 is usual"
        )
    length = windows.shape[1]
    known: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for n in range(len(windows)):
        known[f"{n}/log_p"] = (torch.float16, (length, k))
        known[f"{n}/rest"] = (torch.float32, (length,))
        known[f"{n}/tokens"] = (torch.int32, (length, k))
    metadata = {"vocabulary": str(teacher.vocabulary)}
    unfinished = file.with_suffix(".unfinished")
    with ShardWriter(unfinished, known, [], metadata) if writes else nullcontext() as writer:
        for n, window in enumerate(windows):
            expected, _ = teacher(Batch(window[None].to(device), (n,)), temperature, ())
            for part, value in zip(PARTS, _most_likely(expected, length, k), strict=True):
                if writer is not None:
                    writer.write(f"{n}/{part}", value.to(known[f"{n}/{part}"][0]).cpu())
            on_window()
        if writer is not None:
            writer.close(metadata)
    if writes:
        unfinished.replace(file)


def _most_likely(expected: Expected, length: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p of the k most likely tokens at every position, log of the rest, and the ids."""
    found = []
    # 64 tokens at a time: a copy of all their log probabilities is [64, vocabulary], float32
    for start in range(0, length, 64):
        log_p = expected(slice(start, min(start + 64, length)), torch.empty(0))
        most = log_p.topk(k, dim=-1)
        rest = log_p.scatter_(1, most.indices, -torch.inf).logsumexp(-1)
        found.append((most.values, rest, most.indices))
    values, rests, tokens = (torch.cat(x) for x in zip(*found, strict=True))
    return values, rests, tokens


Objective = Callable[[Any, Batch], Tensor]
"""A model and a batch → the differentiable loss, float32: the mean over the tokens of the batch."""


def next_token(model: Any) -> Objective:
    """The usual loss of language models, in nats: mean_t −log q_t(the token after t).

    All processes that share the model must call this together.
    """
    head = head_alone(model)
    return lambda model, batch: loss_of(model, head, batch.ids, _next_tokens(batch))


@dataclass(frozen=True)
class Distil:
    """loss = (1 − next_token) · T² · divergence(p, q) + next_token · next-token loss
                                                        + hidden · distance of hidden states

    The divergence is the mean over all tokens, or over those before a token of an answer where the
    batch has answers. `divergences.py` defines the terms.

    Papers: Hinton et al. 2015, arXiv:1503.02531; for pruned and cut models Muralidharan et al.
    2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
    arXiv:2407.14679, where the forward divergence alone was best; SquareHead, arXiv:2310.06927.

    Args:
        head: the student's output head, if its output is exactly the logits; else None.
        teacher: the model to learn from.
        kind: one of `KINDS`.
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
            pairs = divergences.layer_pairs(layers, teacher_depth, teacher_layers)
        return cls(head_alone(student), teacher, hidden=hidden, pairs=pairs, **options)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `Objective`."""
        expected, taught = self.teacher(batch, self.temperature, [j for _, j in self.pairs])
        counted = None if batch.answers is None else batch.targets >= 0
        count = batch.ids.numel() if batch.count is None else batch.count
        rows = divergences.divergence_rows(self.kind, self.temperature, count, expected, counted)
        # Both terms of this usual loss come from one softmax; every other mix takes two passes.
        all_count = batch.count is None and counted is None
        if self.next_token and all_count and self.kind == "forward" and self.temperature == 1:
            counts = batch.ids.numel(), batch.ids.numel() - len(batch.ids)
            rows = divergences.forward_and_next_token_rows(
                expected, batch.targets, counts, self.next_token
            )
        elif self.next_token:
            rows = _blend(rows, _next_tokens(batch), self.next_token)
        layers = describe(model).layers(model) if self.pairs else ()
        with outputs_of({i: layers[i] for i, _ in self.pairs}) as hidden:
            loss = loss_of(model, self.head, batch.ids, rows)
        if self.pairs:
            loss = loss + self.hidden * divergences.hidden_loss(hidden, taught, self.pairs)
        return loss


def _next_tokens(batch: Batch) -> Rows:
    """Return the next-token loss of a batch. The last token of a window has no next token."""
    count = batch.ids.numel() - len(batch.ids) if batch.count is None else batch.count
    return divergences.next_token_rows(batch.targets, count)


def _blend(one: Rows, other: Rows, share: float) -> Rows:
    """Return (1 − share) · the first loss + share · the second."""

    def of(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        # both overwrite the logits they get, so the first one to run gets a copy
        loss, gradient = other(rows, logits.clone())
        first, slope = one(rows, logits)
        return first.lerp(loss, share), slope.lerp_(gradient, share)

    return of
