"""Measures whole models against the dense one, on windows that made none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.choose.tournament import Lockstep, Tournament, fingerprint
from secateur.engine.choose.values import StoredVariants
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.load import load
from secateur.workflows.fit.ground import Ground
from secateur.workflows.fit.making import Kinds, packed


class Yardstick:
    """Measures divergences: mean KL(dense ‖ model) of the next-token probabilities, nats per token.

    The models may have other layers and widths than the dense one, but its vocabulary. What was
    measured is kept in files.

    Args:
        ground: of the fit.
        windows: token ids [windows, length].
        name: of the windows, for the files.
    """

    def __init__(self, ground: Ground, windows: Tensor, name: str) -> None:
        self.ground, self.windows, self.name = ground, windows, name
        self.dense = self.lockstep(ground.target, None)

    def divergence(self, folder: Path) -> float:
        """The divergence of a model as it is, which is not packed."""
        device, trust = self.ground.target.device, self.ground.recipe.trust_remote_code
        target = CheckpointTarget(CheckpointReader(folder), None, device, trust_remote_code=trust)
        lockstep = self.lockstep(target, self.dense)
        versions = ("dense",) * len(target.layers)
        rows = range(len(self.windows))
        return self.kept(folder, lambda: lockstep.fitness([versions], rows)[0])

    def packed(self, sparse: Path, folder: Path, kinds: Kinds) -> tuple[Path, float]:
        """Pack a model that was made, and measure it as it runs.

        Args:
            sparse: the model before rounding.
            folder: the model.
            kinds: how every linear is stored.

        Returns:
            The packed folder and its divergence.
        """
        ground, source = self.ground, replace(self.ground.source, folder=sparse)
        output = ground.work / "packed" / self.name_of(folder)
        packed(ground.recipe, source, folder, kinds, output, ground.progress)
        return output, self.kept(output, lambda: self.running(output))

    @torch.no_grad()
    def running(self, folder: Path) -> float:
        """The divergence of a packed model in the kernels."""
        model = load(folder, trust_remote_code=self.ground.recipe.trust_remote_code)
        self.dense.pass_dense()
        total = 0.0
        with self.dense.outside():
            for row, ids in enumerate(self.windows):
                logits = model(input_ids=ids[None]).logits[0]
                total += self.dense.measure(row)(logits.to(self.ground.target.device))
        return total / len(self.windows)

    def kept(self, folder: Path, measure: Callable[[], float]) -> float:
        """A value of a model, from its file or else measured."""
        name = self.name_of(folder)
        file = self.ground.work / "measured" / f"{self.name}-{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        told = fingerprint(self.dense.ends, self.windows.numel(), "divergence", ())
        values = Tournament(self.dense, lambda _: (), file, {**told, "model": name})
        self.ground.progress.start(f"measuring {name}", 1)
        found: float = values.noted("divergence", measure)
        self.ground.progress.finish()
        return found

    def name_of(self, folder: Path) -> str:
        """A name for a folder among the work of the run, and for the dense model."""
        work = self.ground.work
        return "-".join(folder.relative_to(work).parts) if folder.is_relative_to(work) else "dense"

    def lockstep(self, target: CheckpointTarget, dense: Lockstep | None) -> Lockstep:
        """Passes one model, as it is, through its layers."""
        ends = ModelEnds(target, self.windows)
        variants = StoredVariants(ends, (), ())
        return Lockstep(ends, variants, "divergence", self.ground.progress, dense)
