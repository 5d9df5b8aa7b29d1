"""Files of llama.cpp's own quantizer with an importance matrix, as people make and download them.

The importance matrix is what `llama-imatrix` collects from the exact file: for each matrix, the mean
square of every input over all tokens of the calibration. A row that is no multiple of 256 weights long gets another
type from llama.cpp; `types_of` counts what a file really has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from benchmarks.gguf_files.importance import HEADS, chosen, collected, means, write
from torch import Tensor

from secateur import export
from secateur.exporting.gguf.expert_scores import ImportanceMatrix
from secateur.exporting.gguf.llama_cpp import LlamaCpp, quantize

F = gguf.LlamaFileType

TYPES = MappingProxyType(
    {
        "IQ2_XXS": F.MOSTLY_IQ2_XXS, "IQ2_XS": F.MOSTLY_IQ2_XS, "IQ2_S": F.MOSTLY_IQ2_S,
        "IQ2_M": F.MOSTLY_IQ2_M, "Q2_K_S": F.MOSTLY_Q2_K_S, "Q2_K": F.MOSTLY_Q2_K,
        "IQ3_XXS": F.MOSTLY_IQ3_XXS, "IQ3_XS": F.MOSTLY_IQ3_XS, "IQ3_S": F.MOSTLY_IQ3_S,
        "IQ3_M": F.MOSTLY_IQ3_M, "Q3_K_S": F.MOSTLY_Q3_K_S, "Q3_K_M": F.MOSTLY_Q3_K_M,
        "Q3_K_L": F.MOSTLY_Q3_K_L, "IQ4_XS": F.MOSTLY_IQ4_XS, "IQ4_NL": F.MOSTLY_IQ4_NL,
        "Q4_0": F.MOSTLY_Q4_0, "Q4_K_S": F.MOSTLY_Q4_K_S, "Q4_K_M": F.MOSTLY_Q4_K_M,
        "Q5_K_S": F.MOSTLY_Q5_K_S, "Q5_K_M": F.MOSTLY_Q5_K_M, "Q6_K": F.MOSTLY_Q6_K,
        "Q8_0": F.MOSTLY_Q8_0,
    }
)  # fmt: skip
"""The mixes: most matrices have the type in the name."""

PURE = MappingProxyType(
    {
        "IQ2_XXS": F.MOSTLY_IQ2_XXS, "IQ2_XS": F.MOSTLY_IQ2_XS, "IQ2_S": F.MOSTLY_IQ2_M,
        "Q2_K": F.MOSTLY_Q2_K, "IQ3_XXS": F.MOSTLY_IQ3_XXS, "IQ3_S": F.MOSTLY_IQ3_S,
        "Q3_K": F.MOSTLY_Q3_K_M, "IQ4_XS": F.MOSTLY_IQ4_XS, "IQ4_NL": F.MOSTLY_IQ4_NL,
        "Q4_0": F.MOSTLY_Q4_0, "Q4_K": F.MOSTLY_Q4_K_M, "Q4_1": F.MOSTLY_Q4_1,
        "Q5_0": F.MOSTLY_Q5_0, "Q5_K": F.MOSTLY_Q5_K_M, "Q5_1": F.MOSTLY_Q5_1,
        "Q6_K": F.MOSTLY_Q6_K, "Q8_0": F.MOSTLY_Q8_0,
    }
)  # fmt: skip
"""The types that can be those of all matrices, each with a mix that is named after it."""


@dataclass(frozen=True)
class LlamaFiles:
    """What llama.cpp's quantizer makes of one model.

    Attributes:
        exact: the model as a float32 GGUF file.
        importance: the mean squares of the inputs, by the tensor's name in the file.
    """

    exact: Path
    importance: dict[str, np.ndarray]

    @classmethod
    def prepare(cls, model: Path, windows: Tensor, work: Path) -> LlamaFiles:
        """Write the exact file and collect the importance matrix, unless they are there."""
        folder, stored = work / "exact", work / "importance.gguf"
        if not folder.exists():
            export(model, to="gguf", type="f32", output=folder, overwrite=True)
        (exact,) = folder.glob("*.gguf")
        if not stored.exists():
            with LlamaCpp(exact) as engine:
                found = collected(engine, windows, head=True)
            write(found, stored, windows.shape[1])
        return cls(exact, means(ImportanceMatrix.read(stored)))

    def mix(self, kind: str, file: Path) -> None:
        """Make a file of a mix in `TYPES`."""
        known = {name: x for name, x in self.importance.items() if name not in HEADS}
        self._made(file, kind=TYPES[kind], **chosen(known))

    def pure(self, kind: str, file: Path) -> None:
        """Make a file with one type of `PURE` throughout.

        The embedding gets its importance too, without which IQ2 does not exist.
        """
        types = {"weight": gguf.GGMLQuantizationType[kind]}
        self._made(file, kind=PURE[kind], **chosen(self.importance, types))

    def _made(self, file: Path, **options: Any) -> None:
        partial = file.with_suffix(".partial")
        quantize(self.exact, partial, nthread=1, **options)
        partial.rename(file)


def types_of(file: Path) -> tuple[dict[str, int], int]:
    """How many matrices of a file have each type, and the bytes of all its tensors."""
    tensors = gguf.GGUFReader(file).tensors
    kinds = Counter(x.tensor_type.name for x in tensors if len(x.shape) > 1)
    return dict(kinds), sum(int(x.n_bytes) for x in tensors)
