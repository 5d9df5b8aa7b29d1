"""A tiny pruned model and text, for tests of the loop."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from zoo import CONFIGS

from secateur.training.batches import Batches
from secateur.training.loop import Loop, Outcome, TrainingTask
from secateur.training.masks import Masks, open_masks
from secateur.training.training_plan import TrainingPlan

SEQUENCES = torch.arange(40 * 12).view(40, 12).mul(7).remainder(23) + 4
"""Windows with something to learn: every token follows from the one before it."""

EXACT: dict[str, Any] = {"fast_matmuls": False, "learning_rate": 5e-3}


def pruned_model(family: str = "llama", sparsity: float = 0.5, dtype: Any = torch.float32) -> Any:
    """Random weights, the smallest half of each matrix zero."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name in open_masks(model):
            weight = model.get_parameter(name)
            limit = weight.abs().float().flatten().kthvalue(int(sparsity * weight.numel())).values
            weight.masked_fill_(weight.abs().float() <= limit, 0.0)
    return model


def batches(size: int = 4, windows: Tensor = SEQUENCES) -> Batches:
    """What each step reads."""
    return Batches(windows, size, seed=0)


def weights(model: Any) -> dict[str, Tensor]:
    """All parameters, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def zeros(model: Any) -> dict[str, Tensor]:
    """Where the matrices of the layers are zero."""
    return {n: ~kept for n, kept in open_masks(model).items()}


def watched(windows: Tensor) -> Batches:
    """Windows for validation."""
    return Batches(windows, len(windows))


def train(
    model: Any, read: Batches, objective: Any, masks: Masks, plan: TrainingPlan, **options: Any
) -> Outcome:
    """Run a loop."""
    of_task = {n: options.pop(n) for n in ("validation", "hooks", "trained") if n in options}
    return Loop(TrainingTask(model, read, objective, masks, **of_task), plan, **options).run()
