"""A fit to the types of somebody's GGUF file: the same bytes, with better codes in them.

The file says how every matrix is stored (`exporting.gguf.like`). The model is rounded to these
types and healed on them, as any candidate of a fit is, and its codes replace those of the file. The
architecture is the file's, so no family has to be described. Both files are judged by the same
evaluation of their own weights, on text that did not choose, and the result must be better.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from secateur.errors import VerificationError
from secateur.exporting.gguf.edit import written
from secateur.exporting.gguf.like import FileLayout
from secateur.models.gguf_file import PART
from secateur.progress import Progress
from secateur.reporting.fit import FitLike
from secateur.runtime.formats import WeightFormat
from secateur.runtime.install import open_checkpoint
from secateur.runtime.storage_plan import MixedReader, PackableCheckpoint
from secateur.steps.fitting.bench import DivergenceComparison, FitBench
from secateur.steps.fitting.problem import Formats, GGUFFolder


class LikeFolder(GGUFFolder):
    """A packed folder, and somebody's GGUF file with other codes in it.

    Args:
        layout: the matrices of the model in the file.
    """

    def __init__(self, layout: FileLayout) -> None:
        self.layout = layout
        part = PART.fullmatch(layout.file.file.name)
        self.name = f"{part['stem']}.gguf" if part else layout.file.file.name

    @property
    def own_formats(self) -> Formats:
        """The types of the file; bfloat16 for matrices that stay as the file has them."""
        layout = self.layout
        return {
            matrix.linear or name.removesuffix(".weight"): WeightFormat(
                layout.values.get(name, "bfloat16"), 0.0
            )
            for name, matrix in layout.model.matrices.items()
        }

    def finish(self, folder: Path, progress: Progress) -> int:
        """Write the file with the codes of the packed folder; the bytes of the file."""
        reader = open_checkpoint(folder)

        def packed(name: str) -> Tensor:
            blocks = reader.blocks(name)
            assert blocks is not None  # the format of the matrix is the type of the file
            return blocks.packed

        edit = self.layout.edit(packed)
        files = written(self.layout.file, edit, folder / self.name, progress)
        return sum(file.stat().st_size for file in files)

    def read_back(self, folder: Path, model: PackableCheckpoint) -> MixedReader:
        """The model with the matrices of the file that was written."""
        return self.layout.weights(self.written(folder))

    def judged(self, bench: FitBench, folder: Path) -> FitLike:
        """The result beside the file, on windows that did not choose.

        Raises:
            VerificationError: the file diverges less from the model.
        """
        file = bench.work / "measured-judged.jsonl"
        judged = DivergenceComparison(bench.target, bench.judging.windows, file, bench.progress)
        layout, name = self.layout, self.layout.file.file.name
        theirs = judged.of(bench.opened(layout.weights()), name)
        ours = judged.of(bench.opened(self.read_back(folder, layout.model)), "the result")
        if ours >= theirs:
            raise VerificationError(
                f"the new codes diverge from the model by {ours:.5f} nats per token, and those of "
                f"the file by {theirs:.5f}",
                where=str(layout.file.file),
                remedy="keep the file; or give more calibration text, or more --heal-tokens",
            )
        kept = [tensor for tensor in layout.sheets if tensor not in layout.replaced]
        return FitLike(str(layout.file.file), theirs, ours, tuple(kept), layout.unchecked)
