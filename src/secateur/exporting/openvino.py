"""OpenVINO: a GGUF file of a kind that openvino-genai loads.

openvino-genai builds its graph from the file by itself, with the tokenizer and the chat template.
So nothing of OpenVINO is needed to write the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from secateur.errors import ExportError
from secateur.exporting import Exported, ExportSource, targets
from secateur.exporting.gguf import GGUF
from secateur.progress import Progress

KNOWN = ("llama", "qwen2")
"""Qwen3 loads too, but its greedy tokens were not those of transformers."""


class OpenVINO:
    """One `.gguf` file that `openvino_genai.LLMPipeline` loads.

    Models of Llama's and Qwen2's layout, with float16, Q8_0 or Q4_0 matrices.
    """

    name: ClassVar[str] = "openvino"
    types: ClassVar[tuple[str, ...]] = ("q8_0", "f16", "q4_0")

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write the file."""
        kind = source.config.get("model_type")
        if kind not in KNOWN:
            raise ExportError(
                f"only models of type {' and '.join(KNOWN)} were seen to run alike in "
                f"openvino-genai, not {kind!r}",
                where=str(source.folder),
                remedy="export to gguf and run it in llama.cpp",
            )
        return GGUF().write(source, type, output, progress)


targets.register(OpenVINO.name)(OpenVINO())
