"""Measures whole models against the dense one, on windows that made none of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.choose.tournament import Lockstep, Tournament, fingerprint
from secateur.engine.choose.values import StoredVariants
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import CheckpointReader
from secateur.workflows.fit.ground import Ground

__all__ = ["Yardstick"]


class Yardstick:
    """Measures folders of models; what was measured is kept in files.

    The models may have other layers and widths than the dense one, but its vocabulary.

    Args:
        ground: of the fit.
        windows: token ids [windows, length].
        name: of the windows, for the files.
    """

    def __init__(self, ground: Ground, windows: Tensor, name: str) -> None:
        self.ground, self.windows, self.name = ground, windows, name
        self.dense = self.lockstep(ground.target, "divergence", None)

    @torch.no_grad()
    def divergence(self, folder: Path) -> float:
        """Mean KL(dense ‖ model) of the next-token probabilities, in nats per token."""
        return self.measured(folder, "divergence")

    @torch.no_grad()
    def rise(self, folder: Path) -> float:
        """The mean loss of the next token above that of the dense model, in nats per token."""
        return self.measured(folder, "loss") - self.measured(self.ground.reader.folder, "loss")

    def measured(self, folder: Path, objective: str) -> float:
        """A value of a model, from its file or else measured."""
        work, tokens = self.ground.work, self.windows.numel()
        inside = folder.is_relative_to(work)
        name = "-".join(folder.relative_to(work).parts) if inside else "dense"
        device, trust = self.ground.target.device, self.ground.recipe.trust_remote_code
        target = CheckpointTarget(CheckpointReader(folder), None, device, trust_remote_code=trust)
        lockstep = self.lockstep(target, objective, self.dense)
        file = work / "measured" / f"{self.name}-{objective}-{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        told = {**fingerprint(lockstep.ends, tokens, objective, ()), "model": name}
        self.ground.progress.start(f"measuring {name}", 1)
        measure = Tournament(lockstep, lambda _: ((),) * len(target.layers), file, told)
        (found,) = measure([()], tokens, 0)
        self.ground.progress.finish()
        return found

    def lockstep(
        self, target: CheckpointTarget, objective: str, dense: Lockstep | None
    ) -> Lockstep:
        """Passes one model, as it is, through its layers."""
        ends = ModelEnds(target, self.windows)
        variants = StoredVariants(ends, (), ())
        return Lockstep(ends, variants, objective, self.ground.progress, dense)
