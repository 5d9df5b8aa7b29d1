"""GGUF: the file of llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
import torch

from secateur.exporting import Exported, ExportSource, targets
from secateur.exporting.gguf.architectures import LlamaCppDecoder, decoder_of
from secateur.exporting.gguf.blocks import (
    BLOCK,
    TYPES,
    bytes_per_row,
    stored_blocks,
    zeros_kept,
)
from secateur.exporting.gguf.tokenizer import add_tokenizer
from secateur.progress import Progress

__all__ = ["GGUF"]

Q = gguf.GGMLQuantizationType

FILE_TYPES = {
    Q.F32: gguf.LlamaFileType.ALL_F32,
    Q.F16: gguf.LlamaFileType.MOSTLY_F16,
    Q.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Q.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Q.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Q.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}
NUMPY = {Q.F32: np.float32, Q.F16: np.float16}
ENDS = ("token_embd.weight", "output.weight")
"""Embedding and head. With fewer than 8 bits they become Q8_0, because every token reads them."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file.

    Attributes:
        name: in GGUF.
        source: its name in the source; empty for one that the source does not store.
        shape: its shape.
        type: how it is stored.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: Q


@dataclass(frozen=True)
class GGUF:
    """One `.gguf` file with weights, configuration, tokenizer and chat template.

    Matrices have the chosen type. Norms and biases are float32. The embedding and the head are at
    least Q8_0. A row that is no multiple of 32 weights long cannot have blocks and is float16.
    """

    name: ClassVar[str] = "gguf"
    types: ClassVar[tuple[str, ...]] = tuple(TYPES)

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write the file, one tensor in memory at a time."""
        decoder, kind = decoder_of(source), TYPES[type]
        file = output / f"{source.name}-{type}.gguf"
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[decoder.arch])
        writer.add_name(source.name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        decoder.add_fields(writer)
        add_tokenizer(writer, source.folder, decoder.vocabulary)
        extra = dict(decoder.extra_tensors())
        plan = [
            Planned(name, stored, shape, stored_type(name, shape, kind))
            for name, stored, shape in decoder.tensors(source)
        ]
        plan += [
            Planned(n, "", tuple(x.shape), stored_type(n, x.shape, kind)) for n, x in extra.items()
        ]
        for one in plan:
            add_info(writer, one)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        made = Exported(notes=notes_on(decoder, plan, kind))
        progress.start("writing", len(plan))
        for one in plan:
            tensor = source.reader.read(one.source) if one.source else extra[one.name]
            weight = decoder.arranged(one.source, tensor).float()
            stored = stored_blocks(weight, one.type)
            writer.write_tensor_data(stored)
            made.types[one.type.name] = made.types.get(one.type.name, 0) + 1
            if weight.ndim == 2 and one.source and one.name not in ENDS:
                made.weights += weight.numel()
                made.zeros += weight.numel() - int(torch.count_nonzero(weight))
                made.zeros_kept += zeros_kept(weight, stored, one.type)
            progress.step(note=one.name)
        progress.finish()
        writer.close()
        made.file_bytes = file.stat().st_size
        return made


def stored_type(name: str, shape: tuple[int, ...], wanted: Q) -> Q:
    """The type of a tensor when the matrices are of the type `wanted`."""
    if len(shape) == 1:
        return Q.F32
    if name in ENDS and wanted in (Q.Q4_0, Q.Q5_0):
        wanted = Q.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else Q.F16


def add_info(writer: gguf.GGUFWriter, one: Planned) -> None:
    """Announce a tensor."""
    rows, size = one.shape[:-1], bytes_per_row(one.shape[-1], one.type)
    nbytes = size * int(np.prod(rows, dtype=np.int64))
    if one.type in NUMPY:
        writer.add_tensor_info(one.name, one.shape, np.dtype(NUMPY[one.type]), nbytes)
    else:
        writer.add_tensor_info(one.name, (*rows, size), np.dtype(np.uint8), nbytes, one.type)


def notes_on(decoder: LlamaCppDecoder, plan: list[Planned], kind: Q) -> list[str]:
    """What a user must know about the file."""
    notes = []
    odd = [one.name for one in plan if one.type == Q.F16 != kind]
    if odd:
        notes.append(
            f"{len(odd)} matrices have rows that are no multiple of {BLOCK} weights long and are "
            f"float16, for example {odd[0]}"
        )
    if decoder.window:
        notes.append(
            f"llama.cpp ignores the sliding window of {decoder.window} tokens, so the context "
            "is limited to it"
        )
    return notes


targets.register(GGUF.name)(GGUF())
