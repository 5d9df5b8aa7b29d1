"""The bytes of a GGUF file of the type `stored`, before there is one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from secateur.exporting import ExportSource
from secateur.exporting.gguf.architectures import model_of
from secateur.exporting.gguf.blocks import NEAREST, bytes_per_row
from secateur.exporting.gguf.tokenizer import read_vocabulary
from secateur.exporting.gguf.writing import GGUFFile, padded_bytes, stored_type_of_row
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import read_config


def bytes_of_matrix(shape: tuple[int, int], values: str) -> int:
    """Bytes of a matrix [out, in] whose values are stored so in a packed folder."""
    rows, columns = shape
    kind = stored_type_of_row(columns, NEAREST[values])
    return padded_bytes(rows * bytes_per_row(columns, kind))


def bytes_as_stored(reader: CheckpointReader, values: Mapping[str, str]) -> int:
    """Bytes of the file for a model, all but its name taken into account.

    Args:
        reader: the model, dense.
        values: how each matrix will be stored in the packed folder, by stored name.

    Raises:
        ArchitectureError: llama.cpp does not know this model, or computes it differently.
        CheckpointError: the tokenizer cannot be expressed.
    """
    source = ExportSource("model", reader.folder, read_config(reader.folder), reader)
    model = model_of(source)
    vocabulary = read_vocabulary(reader.folder, model.decoder.vocabulary)
    own = {name: NEAREST[kind] for name, kind in values.items()}
    with tempfile.TemporaryDirectory() as scratch:
        whole = GGUFFile(source, model, vocabulary, NEAREST["bfloat16"], own)
        return whole.nbytes(Path(scratch) / "header.gguf")
