"""Run by torchrun in two processes: the callback in transformers' Trainer (DDP), and with FSDP 2.

torchrun --nproc-per-node 2 callback_run.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learning import SEQUENCES, pruned_model, zeros
from test_callback import trainer_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from secateur import SecateurCallback
from secateur.errors import RecipeError, VerificationError
from secateur.training.masks import whole


def with_ddp(folder: Path) -> None:
    """Three steps in two processes, saved by the first one."""
    trainer = trainer_of(
        pruned_model(), folder, SecateurCallback(), max_steps=3, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, optim="adafactor", save_strategy="steps", save_steps=3,
    )  # fmt: skip
    assert trainer.args.world_size == 2
    trainer.train()


def with_fsdp2() -> None:
    """The hooks as a trainer calls them, on a model whose rows are shared out.

    accelerate applies FSDP 2 on GPUs alone, so no trainer does it here.
    """
    model = pruned_model()
    gone = zeros(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)  # it moves zeros
    callback, given = SecateurCallback(), {"model": model, "optimizer": optimizer}
    settings = (SimpleNamespace(deepspeed=None), None, SimpleNamespace(should_save=True))
    callback.on_train_begin(*settings, **given)
    ids = SEQUENCES[torch.distributed.get_rank() :: 2][:4]
    before = whole(model.model.layers[0].mlp.up_proj.weight)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        callback.on_pre_optimizer_step(*settings, **given)
        optimizer.step()
        callback.on_optimizer_step(*settings, **given)
        optimizer.zero_grad()
        callback.on_step_end(*settings, **given)
    for name, zero in gone.items():
        assert not whole(model.get_parameter(name))[zero].any(), name
    assert not torch.equal(whole(model.model.layers[0].mlp.up_proj.weight), before)
    broken = model.model.layers[0].mlp.up_proj.weight.to_local()
    if torch.distributed.get_rank() == 1:  # all processes must stop for the fault of one
        broken.data.fill_(1.0)
    with pytest.raises(VerificationError, match="pruned"):
        callback.on_train_end(*settings, **given)


def other_axes_are_refused() -> None:
    """Columns of a matrix shared out, as tensor parallelism does."""
    model, mesh = pruned_model(), init_device_mesh("cpu", (2,))
    linear = model.model.layers[0].mlp.up_proj
    shared = distribute_tensor(linear.weight.detach(), mesh, [Shard(1)])
    linear.weight = torch.nn.Parameter(shared)
    settings = (SimpleNamespace(deepspeed=None), None, None)
    with pytest.raises(RecipeError, match="axes"):
        SecateurCallback().on_train_begin(*settings, model=model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with_ddp(Path(sys.argv[1]))
    with_fsdp2()
    other_axes_are_refused()
    torch.distributed.destroy_process_group()
