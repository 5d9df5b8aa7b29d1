"""ONNX: a folder for ONNX Runtime, made by the model builder of onnxruntime-genai.

The builder runs as a process of its own. It loads a dense folder with transformers and writes a
graph with ONNX Runtime's own operators. This file gives it the model and counts the zeros in what
it wrote.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ArchitectureError, ExportError, RecipeError, install_extra
from secateur.exporting import Exported, ExportSource, targets
from secateur.exporting.folder import copy_the_rest
from secateur.models.opening import write_dense
from secateur.progress import Progress, each_step

SYMMETRIC = ("--extra_options", "is_symmetric=true", "block_size=32")
OPTIONS = MappingProxyType({"fp32": (), "int8": SYMMETRIC, "int4": SYMMETRIC})
"""What the builder is given for each type."""

PACKAGES = ("onnxruntime_genai", "onnx_ir")
MATRIX = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul(_Q\d)?")
FUSED = MappingProxyType({"qkv_proj": ("q_proj", "k_proj", "v_proj")})


class ONNX:
    """A folder with `model.onnx`, its weights, `genai_config.json` and the tokenizer.

    `int8` and `int4` are symmetric blocks of 32 weights with a float32 scale; activations are
    rounded to int8 by ONNX Runtime. Embedding and norms stay float32, but with `int4` an embedding
    that is also the head has its 4 bits.
    """

    name: ClassVar[str] = "onnx"
    types: ClassVar[tuple[str, ...]] = tuple(OPTIONS)

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write the folder."""
        if any(find_spec(package) is None for package in PACKAGES):
            raise RecipeError("onnxruntime-genai is not installed", remedy=install_extra("onnx"))
        if "secateur_cut" in source.config:
            raise ExportError(
                "the model builder of onnxruntime-genai does not know layers of different sizes",
                where=str(source.folder),
                remedy="cut all layers alike: `secateur structure --allocation uniform`",
            )
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            dense = Path(scratch) / "dense"
            dense.mkdir()
            # the builder loads it whatever the source is
            copy_the_rest(source, {}, dense, source.reader.total_bytes)
            write_dense(source.reader, dense, progress)
            _build(dense, output, type, Path(scratch))
        made = _counted(source, output / "model.onnx", progress)
        made.file_bytes = sum(file.stat().st_size for file in output.iterdir())
        return made


def _build(dense: Path, output: Path, type: str, scratch: Path) -> None:
    """Run the model builder."""
    asked = ["-m", "model", "-i", dense, "-o", output, "-p", type, "-e", "cpu", "-c", scratch]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command = [*builder, *map(str, asked), *OPTIONS[type]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if (full := os.strerror(errno.ENOSPC)) in done.stderr:
            raise OSError(errno.ENOSPC, full)
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise ArchitectureError(
            f"the model builder of onnxruntime-genai failed: {said[-1][:300]}",
            where=str(dense),
            remedy="export to gguf or compressed-tensors",
        )


def _counted(source: ExportSource, file: Path, progress: Progress) -> Exported:
    """Count the zeros of every matrix in the graph."""
    import onnx_ir

    made, graph = Exported(), onnx_ir.load(file).graph
    found = ((node, MATRIX.fullmatch(node.name or "")) for node in graph)
    matrices = {part[0]: (node, part) for node, part in found if part}
    for node, part in (matrices[name] for name in each_step(progress, "checking", matrices)):
        where = f"model.layers.{part[1]}.{'self_attn' if part[2] == 'attn' else 'mlp'}"
        names = [f"{where}.{name}.weight" for name in FUSED.get(part[3], (part[3],))]
        # a fused projection has the rows of queries, keys and values, in this order
        weight = torch.cat([source.reader.read(name) for name in names])
        constants = [x.const_value.numpy() for x in node.inputs if x is not None and x.const_value]
        if node.op_type == "MatMul":
            written, kind = torch.from_numpy(np.array(constants[0])).t(), "float32"
        else:
            bits, columns = node.attributes["bits"].value, node.attributes["K"].value
            written, kind = unpacked(*constants, bits=bits, columns=columns), f"int{bits}"
        made.count_matrix(weight, written)
        made.count_tensor(kind)
    return made


def unpacked(codes: np.ndarray, scales: np.ndarray, *, bits: int, columns: int) -> Tensor:
    """The matrix of a symmetric MatMulNBits: scale · (code − 2^(bits − 1)).

    Args:
        codes: uint8 [out, blocks, bytes of a block]; with 4 bits, the lower half of a byte first.
        scales: float32 [out, blocks].
        bits: 4 or 8.
        columns: of the matrix.
    """
    out, blocks = codes.shape[:2]
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    # [out, blocks, weights of a block]; the last block of a row is filled up
    levels = codes.reshape(out, blocks, -1).astype(np.float32) - 2 ** (bits - 1)
    weight = levels * scales.reshape(out, blocks, 1)
    return torch.from_numpy(weight.reshape(out, -1)[:, :columns])


targets.register(ONNX.name)(ONNX())
