"""The loss that makes a student learn the hidden states of a teacher, layer by layer.

    loss = mean over pairs (i, j) of   Σ ‖h_i − g_j‖² / Σ ‖g_j‖²        sums over the tokens

h_i is the output of the student's decoder layer i, and g_j the output of the teacher's layer j.
The division by the size of g_j gives all layers the same weight.

Paper: Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models"
(SquareHead), arXiv:2310.06927.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError

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
        RecipeError: the student has more layers, or `kept` does not fit.
    """
    if student > teacher:
        raise RecipeError(
            f"the student has {student} layers, the teacher {teacher}",
            remedy="name the larger model as the teacher",
        )
    if kept is None:
        return tuple((i, -(-(i + 1) * teacher // student) - 1) for i in range(student))
    kept = tuple(kept)
    rising = list(kept) == sorted(set(kept))
    if len(kept) != student or not rising or not 0 <= kept[0] <= kept[-1] < teacher:
        raise RecipeError(
            f"kept layers {list(kept)} of a student with {student} layers and a teacher with "
            f"{teacher}",
            remedy="name for each layer of the student which layer of the teacher it was",
        )
    return tuple(enumerate([*(k - 1 for k in kept[1:]), teacher - 1]))


class Watch:
    """Keeps the outputs of some modules while the context is open.

    Args:
        modules: decoder layers by number.
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self.modules = modules
        self.seen: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Watch:
        for number, module in self.modules.items():
            self.handles.append(module.register_forward_hook(self.taking(number)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def taking(self, number: int) -> Callable[..., None]:
        """Return a hook that keeps the output of a module."""

        def take(_: nn.Module, inputs: Any, output: Any) -> None:
            self.seen[number] = output[0] if isinstance(output, tuple) else output

        return take


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
        total = total.to(own.device)
        total = total + (own - target).square().sum() / target.square().sum()
    return total / max(len(pairs), 1)
