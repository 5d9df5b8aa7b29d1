"""The steps that pruning a checkpoint and pruning a loaded model share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.calibration.windows import MultimodalInputs
from secateur.engine.prune.asymmetric import AsymmetricRun
from secateur.engine.prune.run import CalibratedRun, Run
from secateur.engine.prune.tasks import Settings, Tasks, gathering
from secateur.engine.search.allocation import Survey, allocate
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.gradients import gather_gradients
from secateur.engine.stream.targets import Target
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import Allocation


@dataclass(frozen=True)
class Job:
    """Everything that determines the pruned weights.

    Attributes:
        target: the model.
        tasks: the tasks of the linears before the allocation.
        windows: calibration tokens [samples, sequence_length], or None if nothing needs them.
        settings: how the work is done.
        allocation: sets the sparsity of each linear.
        sparsity: target sparsity of the whole model.
        multimodal: what the model reads besides the tokens of each window.
    """

    target: Target
    tasks: Tasks
    windows: Tensor | None
    settings: Settings
    allocation: Allocation
    sparsity: float
    multimodal: MultimodalInputs | None = None

    def run(self, ledger: Ledger, progress: Progress, done: int = 0) -> Tasks:
        """Gather gradients if the method needs them, allocate, and prune the layers.

        Args:
            ledger: record of finished layers.
            progress: receives every step.
            done: number of layers that an earlier run finished.

        Returns:
            The tasks, without linears that calibration did not reach.
        """
        settings, tasks, stream = self.settings, self.tasks, self._stream()
        before = gathering(tasks).backward
        if before and stream is not None and settings.work is not None:
            gather_gradients(stream.outer, before, settings.work, progress, settings.ranks)
        if self.allocation.reach > 0:
            survey = Survey(self.target, tasks, stream, settings, progress)
            tasks = allocate(survey, self.allocation, self.sparsity)
        forwards = gathering(tasks, asymmetric=settings.asymmetric).forward or settings.tunes
        if stream is None or not forwards:
            pruning: Run = Run(self.target, tasks, settings, ledger, progress)
        else:
            kind = AsymmetricRun if settings.asymmetric else CalibratedRun
            pruning = kind(self.target, tasks, stream, settings, ledger, progress)
        pruning.execute(done)
        return pruning.tasks

    def _stream(self) -> CalibrationStream | None:
        """The calibration stream."""
        if self.windows is None:
            return None
        how = self.settings
        return CalibrationStream(
            self.target, self.windows, how.micro_batch_tokens, how.in_memory, how.work, how.ranks,
            self.multimodal, on_gpu=how.on_gpu,
        )  # fmt: skip
