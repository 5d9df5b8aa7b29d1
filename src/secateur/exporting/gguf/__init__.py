"""GGUF: the file of llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

import gguf

from secateur.exporting import Exported, ExportSource, targets
from secateur.exporting.gguf.draft_head import write_head_file
from secateur.exporting.gguf.llama_cpp import MIXES, load_llama_cpp, quantized
from secateur.exporting.gguf.writing import NEAREST, STORED, TYPES, GGUFFile, values_of
from secateur.models.configuration import HEAD, type_of
from secateur.progress import Progress

__all__ = ["GGUF"]


class GGUF:
    """One `.gguf` file with weights, configuration, tokenizer and chat template.

    Matrices have the chosen type; with `stored`, each has the one nearest to how the source stores
    it. Norms and biases are float32. The embedding and the head are at least Q8_0. A row that is no
    multiple of 32 weights long cannot have blocks and is float16. llama.cpp makes its own mixes,
    such as q4_k_m, from a float32 file.
    """

    name: ClassVar[str] = "gguf"
    types: ClassVar[tuple[str, ...]] = (*TYPES, STORED, *MIXES)

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write the file."""
        if type_of(source.folder) == HEAD:
            kind = TYPES.get(type, gguf.GGMLQuantizationType.BF16)
            return write_head_file(source.folder, kind, output / f"{source.name}-{type}.gguf")
        if type in MIXES:
            load_llama_cpp()  # before anything is written
        kind, own = TYPES.get(type, gguf.GGMLQuantizationType.F32), {}
        if type == STORED:
            values = {name: values_of(source.reader, name) for name in source.reader.entries}
            own = {name: NEAREST.get(kept, kind) for name, kept in values.items()}
            kind = Counter(own.values()).most_common(1)[0][0]
        whole = GGUFFile(source, kind, own)
        file = output / f"{source.name}-{type}.gguf"
        if type not in MIXES:
            return whole.write(file, progress)
        exact = output / f"{source.name}-f32.gguf"
        try:
            notes = whole.write(exact, progress).notes
            made = quantized(exact, file, type, progress)
        finally:
            exact.unlink(missing_ok=True)
        made.notes += notes
        return made


targets.register(GGUF.name)(GGUF())
