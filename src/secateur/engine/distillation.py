"""After all layers are pruned, the whole model learns from the dense one.

Layer by layer a pruned model can only be near the dense one's hidden states; what counts is what
it says. So its decoder layers are tuned once more, together, until its next-token distributions
are those of the dense model. Zeros stay zeros and nothing is added. Unlike the rest of the engine
this needs both models in memory, and gradients and two moments of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from secateur.engine.ledger import write_tensors
from secateur.engine.precision import fast_matmuls
from secateur.engine.tuning import draw_steps, half_cosine, in_float32
from secateur.errors import NumericalError, RecipeError

__all__ = ["Distillation", "Distiller", "divergence"]

_RATE_TIMES_WIDTH = 0.25
_WARM_UP = 1 / 16
_CLIP = 1.0
_BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SAVE_EVERY = 64
_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Distillation:
    """Adam on all parameters θ of the decoder layers of a pruned model:

        minimise over θ   mean_t KL(p_t ‖ q_t(θ))

    p_t and q_t are what the dense and the pruned model expect after token t. One window a step;
    the learning rate rises to `peak_learning_rate` over the first sixteenth of the steps and falls
    to 0 along a half cosine; gradients are clipped to norm 1 over all parameters.

    Paper: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
    at temperature 1 and with the masks held.

    Args:
        epochs: over the calibration windows; 0 does nothing.
        peak_learning_rate: the highest; None stands for 0.25 / hidden size: what suits a small
            model is too much for a wide one, and Adam's best rate falls as 1 / width (Yang et al.
            2022, arXiv:2203.03466). 0.25 was chosen at a hidden size of 576.

    Raises:
        RecipeError: a number is out of range.
    """

    epochs: int = 0
    peak_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise RecipeError(f"epochs is {self.epochs}", remedy="give 0 or more; 1 is usual")
        if self.peak_learning_rate is not None and not 0 < self.peak_learning_rate < 1:
            raise RecipeError(
                f"peak_learning_rate is {self.peak_learning_rate}",
                remedy="give a small number such as 4e-4",
            )

    def rate(self, step: int, steps: int, width: int) -> float:
        """The learning rate of a step, counted from 0, for a model of this hidden size."""
        peak = self.peak_learning_rate or _RATE_TIMES_WIDTH / width
        warm = min(1.0, (step + 1) / math.ceil(_WARM_UP * steps))
        return peak * warm * half_cosine(step, steps)


def divergence(
    logits: Float[Tensor, "tokens vocabulary"], wanted: Float[Tensor, "tokens vocabulary"]
) -> tuple[float, Float[Tensor, "tokens vocabulary"]]:
    """mean_t KL(p_t ‖ q_t) in nats, and its gradient with respect to `logits`, (q − p) / tokens.

    Computed in float32 for a few tokens at a time, so that nothing of the size of all logits is
    made but the gradient itself.

    Args:
        logits: of q, any floating dtype; the gradient has the same.
        wanted: logits of p.
    """
    gradient, total, tokens = torch.empty_like(logits), 0.0, len(logits)
    for start in range(0, tokens, _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        log_p, log_q = (x[rows].float().log_softmax(-1) for x in (wanted, logits))
        p = log_p.exp()
        apart = torch.where(log_p == -torch.inf, 0.0, p * (log_p - log_q))
        total += float(apart.sum(dtype=torch.float64))
        gradient[rows] = log_q.exp_().sub_(p).div_(tokens).to(gradient.dtype)
    return total / tokens, gradient


class Distiller:
    """One distillation, which can be stopped and gone on with.

    Args:
        student: the pruned causal language model, in eval mode.
        teacher: the dense one, on the same device.
        trained: the names of the parameters that are tuned.
        pruned: those of them that keep their zeros.
        windows: calibration tokens [samples, sequence_length].
        how: epochs and learning rate.
        seed: of the order of the windows.
        saved: file that takes parameters and moments now and then, and at the end; None for none.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        trained: Sequence[str],
        pruned: Sequence[str],
        windows: Tensor,
        how: Distillation,
        seed: int,
        saved: Path | None = None,
    ) -> None:
        self.student, self.teacher, self.windows, self.how = student, teacher, windows, how
        self.order = [w for (w,) in draw_steps(len(windows), 1, how.epochs, seed)]
        self.saved = saved
        self.parameters = {name: student.get_parameter(name) for name in trained}
        self.pruned = pruned
        self.losses: list[float] = []

    def run(self, tell: Callable[[], None]) -> dict[str, float]:
        """Tune the student in place, in float32 whatever its dtype.

        Args:
            tell: called after every step, and for each step that an earlier run had done.

        Returns:
            The mean divergence over the first and the last eighth of the steps.

        Raises:
            NumericalError: the divergence is NaN or infinite.
        """
        with in_float32(self.student, list(self.parameters.values())):
            self.train(tell)
        eighth = -(-len(self.losses) // 8)
        first, last = self.losses[:eighth], self.losses[-eighth:]
        return {
            "divergence_before": sum(first) / len(first),
            "divergence_after": sum(last) / len(last),
        }

    def train(self, tell: Callable[[], None]) -> None:
        """All steps that are left."""
        optimizer = torch.optim.Adam(self.parameters.values(), betas=_BETAS, fused=True)
        width = self.student.get_input_embeddings().weight.shape[1]
        self.go_on(optimizer)
        masks = {name: self.parameters[name].detach() != 0 for name in self.pruned}
        for step, window in enumerate(self.order):
            if step < len(self.losses):
                tell()
                continue
            for group in optimizer.param_groups:
                group["lr"] = self.how.rate(step, len(self.order), width)
            self.losses.append(self.backward(window))
            for name, mask in masks.items():  # with no moments, a pruned weight stays zero
                gradient = self.parameters[name].grad
                assert gradient is not None
                gradient *= mask
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if len(self.losses) % _SAVE_EVERY == 0 or len(self.losses) == len(self.order):
                self.save(optimizer)
            tell()

    def backward(self, window: int) -> float:
        """Gradients of one window's divergence; returns it."""
        ids = self.windows[window][None].to(next(iter(self.parameters.values())).device)
        matmuls = fast_matmuls(ids.device)
        with matmuls, torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits[0]
        with matmuls, torch.enable_grad():
            logits = self.student(input_ids=ids, use_cache=False).logits[0]
        loss, gradient = divergence(logits.detach(), wanted)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the divergence from the dense model is {loss}",
                where=f"step {len(self.losses)} of distillation",
                remedy="lower distillation.peak_learning_rate, or use float32 or bfloat16",
            )
        logits.backward(gradient)
        return loss

    # -- to go on after a stop ------------------------------------------------------------------

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write parameters, moments and divergences, in one step."""
        if self.saved is None:
            return
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, p in self.parameters.items():
            tensors[f"{name}/value"] = p.detach().contiguous()
            tensors |= {f"{name}/{key}": optimizer.state[p][key] for key in _MOMENTS}
        write_tensors(self.saved, tensors)

    def go_on(self, optimizer: torch.optim.Optimizer) -> None:
        """Take up what an earlier run has saved, if there is anything."""
        if self.saved is None or not self.saved.exists():
            return
        with safe_open(self.saved, framework="pt") as stored:
            self.losses = stored.get_tensor("losses").tolist()
            for name, p in self.parameters.items():
                p.data.copy_(stored.get_tensor(f"{name}/value"))
                optimizer.state[p] = {
                    "step": torch.tensor(float(len(self.losses))),
                    **{k: stored.get_tensor(f"{name}/{k}").to(p.device) for k in _MOMENTS},
                }
