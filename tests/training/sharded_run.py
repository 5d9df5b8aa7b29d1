"""Run by torchrun in two processes: a training whose weights, masks and moments are shared out.

torchrun --nproc-per-node 2 sharded_run.py FOLDER STEPS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from learning import EXACT, SEQUENCES, batches, pruned_model, watched

from secateur.training.loop import Loop
from secateur.training.masks import Masks, local
from secateur.training.objectives import NextToken
from secateur.training.training_plan import TrainingPlan


def main(folder: Path, steps: int) -> None:
    """Train and leave `final.safetensors`."""
    torch.set_num_threads(1)
    model = pruned_model()
    loop = Loop(
        model,
        batches(),
        NextToken.of(model),
        Masks.of(model),
        TrainingPlan(steps=steps, save_minutes=0, validations=2, optimizer="SGD", **EXACT),
        validation=watched(SEQUENCES[:4]),
        saved=folder,
    )
    loop.run()
    if loop.processes.count > 1:
        parts = [local(p).numel() < p.numel() for p in loop.parameters.values()]
        assert sum(parts) > len(parts) // 2, "the weights were not shared out"
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
