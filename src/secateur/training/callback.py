"""Holds the zeros of a pruned model inside somebody else's trainer.

The callback does at each step what `training/loop.py` does: it removes the gradients of pruned
weights, and sets weights and moments to 0 after steps of optimizers that move them. It works with
transformers' Trainer and with trainers built on it, such as those of TRL and Axolotl.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from secateur.errors import RecipeError, VerificationError
from secateur.models.configuration import trusted_folder
from secateur.training.masks import Masks, first_names, is_shared, local, masks_in


class SecateurCallback(TrainerCallback):
    """Keeps the zeros of a pruned model while transformers' Trainer trains it.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SecateurCallback()])

    At each step, gradient ⊙= M; after the step, W ⊙= M and moments ⊙= M for optimizers that do not
    keep them at 0. M is true where the model is not zero when the training begins, or comes from
    `masks`. With peft's adapters the base model is frozen: the callback only checks it, and
    `secateur.merge` keeps the zeros afterwards.

    Args:
        masks: a file of masks, or the folder of a pruned model; None for the zeros of the model.
        trust_remote_code: whether code that comes with that folder may run.

    Raises:
        RecipeError: when the training begins: the model has no zeros, the masks are of another
            model, or the model is sharded in a way that hides its parameters (DeepSpeed, FSDP 1).
        VerificationError: before a save and at the end: zeros were lost; names the matrices.
    """

    def __init__(self, masks: str | Path | None = None, *, trust_remote_code: bool = False) -> None:
        self.source = None if masks is None else trusted_folder(masks, trust_remote_code)
        self.masks = Masks({})
        self.hooks: list[Any] = []

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the matrices that have a mask, in this process's part."""
        return self.masks.sparsity

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Find the masks, and set pruned weights and moments of a resumed training to 0."""
        model = _inner(given["model"])
        _refuse_hidden(args, model)
        self.release()
        self.masks = self.found(model, is_adapted=model is not given["model"])
        if not _sum_over_processes([self.masks.zeros], model)[0]:
            raise RecipeError(
                "the model has no zeros to hold",
                remedy="train a pruned model, or name a pruned folder: SecateurCallback('PRUNED')",
            )
        # a trainer that resumes has loaded weights and moments already
        self.masks.apply(model, _inner_optimizer(given.get("optimizer")))
        for parameter, mask in self.masks.of_parameters(model):
            if parameter.requires_grad and not is_shared(parameter):
                # before the trainer clips, so that pruned weights do not count in the norm
                self.hooks.append(parameter.register_hook(partial(torch.mul, mask)))

    def found(self, model: nn.Module, is_adapted: bool) -> Masks:
        """The masks that this training holds, for the model within peft's wrapper."""
        if is_adapted and self.source is not None:
            raise RecipeError(
                "adapters leave the base model unchanged, so there are no masks to give it",
                remedy="put the adapters on the pruned model, and leave masks out",
            )
        if is_adapted:
            # without the zeros of the adapters: peft freezes the matrices of the model alone
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
            kept = Masks.of(model).kept
            return Masks({name: mask for name, mask in kept.items() if name in frozen})
        if self.source is None:
            return Masks.of(model)
        return masks_in(self.source, model, sums=partial(_sum_over_processes, model=model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remove the gradients of pruned weights; those of FSDP 2 have passed no hook."""
        self.masks.hold_gradients(_inner(given["model"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Set pruned weights and their moments to 0, unless the optimizer keeps them there."""
        self.masks.hold(_inner(given["model"]), _inner_optimizer(given.get("optimizer")))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the zeros if the trainer saves after this step or epoch."""
        if control.should_save:
            self.check(given["model"], "the checkpoint is not saved")

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the zeros if the trainer saves whenever an evaluation is the best."""
        if args.save_strategy == "best":
            self.check(given["model"], "the checkpoint is not saved")

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the zeros again, in case another callback asked for the save."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.check(given["model"], f"{folder} holds a denser model: remove it")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the zeros of the trained model, and remove the hooks."""
        self.release()
        self.check(given["model"], "do not save the model")

    def check(self, model: Any, consequence: str) -> None:
        """Refuse a model that lost zeros.

        Raises:
            VerificationError: names the matrices.
        """
        model = _inner(model)
        filled = self.masks.filled(model)
        # all processes must stop together, and each knows only its part
        total = int(_sum_over_processes([sum(filled.values())], model)[0])
        if total:
            raise VerificationError(
                f"{total:,} pruned weights are not zero any more; {consequence}",
                where=first_names(filled) or "parts of other processes",
                remedy="something changed weights after the optimizer's step, such as another "
                "callback or an average of weights; secateur.SecateurCallback must come last",
            )

    def release(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def _inner(model: Any) -> nn.Module:
    """The model within peft's wrapper."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _inner_optimizer(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper, whose class says what it does to zeros."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _refuse_hidden(args: Any, model: nn.Module) -> None:
    """Refuse shardings that hide the parameters of a model from a callback."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard

    reason = None
    if getattr(args, "deepspeed", None):
        reason = "DeepSpeed keeps its own copies of the weights"
    elif any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        reason = "FSDP 1 joins the weights of a layer to one flat tensor"
    elif any(p.placements != (Shard(0),) for p in model.parameters() if is_shared(p)):  # type: ignore[attr-defined]
        reason = "the model is shared out along other axes than rows"
    if reason is not None:
        raise RecipeError(
            f"zeros cannot be held here: {reason}",
            remedy="use one process, DDP, or FSDP with fsdp_version 2",
        )


def _sum_over_processes(values: Sequence[float], model: nn.Module) -> list[float]:
    """Add up numbers over the processes that share a model; as they are if each has all of it."""
    shared = [local(p) for p in model.parameters() if is_shared(p)]
    if not shared:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64, device=shared[0].device)
    torch.distributed.all_reduce(total)
    return [float(x) for x in total]
