"""Cuts the rows of tokens out of a checkpoint: of the embedding, the head and its bias."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import ArchitectureError, CheckpointError
from secateur.models.at_rest import AssembledReader
from secateur.models.checkpoint import INDEX_NAME, CheckpointReader, copied_files, note_links
from secateur.models.folder_checks import read_config
from secateur.models.opening import open_weights
from secateur.models.skeleton import build_skeleton, model_names
from secateur.progress import Progress, Silent
from secateur.runs.output import cannot_write
from secateur.structured.edits import Edit
from secateur.structured.surgery import write_tensors
from secateur.structured.vocabulary.files import (
    LEFT_OUT,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_tokenizer,
    renumbered_config,
    renumbered_tokenizer,
    renumbered_tokenizer_config,
)
from secateur.structured.vocabulary.pieces import Pieces

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class TokenTables:
    """The parameters with a row for each token.

    Attributes:
        names: of the parameters.
        rows: how many rows they have.
    """

    names: tuple[str, ...]
    rows: int


def token_tables(model: Any) -> TokenTables:
    """The parameters of a model that have a row for each token.

    Args:
        model: loaded or a skeleton.

    Raises:
        ArchitectureError: a table has other rows, or another module has rows for tokens too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ArchitectureError(
            f"the embedding of {type(model).__name__} is no plain table",
            remedy="leave the vocabulary as it is",
        )
    rows, found = embedding.num_embeddings, []
    for path, module in model.named_modules():
        if module is embedding or (head is not None and module is head):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.shape[0] != rows:
                    raise ArchitectureError(
                        f"it has {parameter.shape[0]} rows, the embedding has {rows}",
                        where=f"{path}.{name}",
                        remedy="leave the vocabulary as it is",
                    )
                found.append(f"{path}.{name}")
        elif isinstance(module, nn.Embedding) and "position" not in path and has_tokens(path):
            raise ArchitectureError(
                "another table has a row for each token",
                where=path,
                remedy="leave the vocabulary of this family as it is",
            )
    return TokenTables(tuple(found), rows)


def has_tokens(path: str) -> bool:
    """Whether the name of an embedding says that it is one of tokens."""
    return any(word in path.rpartition(".")[2] for word in ("token", "vocab", "wte", "word"))


def trim_checkpoint(
    folder: Path,
    output: Path,
    pieces: Pieces,
    kept: tuple[int, ...],
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint with a smaller vocabulary, with one tensor in memory.

    All other tensors keep their bytes, in whatever form they are stored.

    Args:
        folder: the checkpoint.
        output: of the new one; it exists.
        pieces: of the tokenizer.
        kept: the ids that stay, ascending.
        trust_remote_code: whether code that comes with the checkpoint may run.
        progress: advances with every tensor.

    Raises:
        ArchitectureError: a table of the model cannot be cut.
        CheckpointError: the embedding is not stored.
        MemoryBudgetError: the disk is full.
    """
    model = build_skeleton(folder, trust_remote_code=trust_remote_code, opened=False)
    tables = token_tables(model)
    opened = open_weights(folder)
    reader = opened.stored if isinstance(opened, AssembledReader) else opened
    edits = row_edits(model, tables, reader, torch.tensor(kept))
    if isinstance(opened, AssembledReader):
        refuse_packed_tables(opened, edits, tables.names)
    try:
        write_files(folder, output, pieces, kept, tables)
    except OSError as error:
        raise cannot_write(error, output) from error
    write_tensors(reader, edits, output, progress or Silent())


def row_edits(
    model: Any, tables: TokenTables, reader: CheckpointReader, index: torch.Tensor
) -> dict[str, Edit]:
    """The edit of every stored tensor.

    Copies of the tables that the model does not know, such as those of layers that predict several
    tokens, are recognised by their names and rows.
    """
    names, known = model_names(model, reader, split=False), set(model.state_dict())
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in tables.names} | {"head"}
    edits, found = {}, 0
    for stored, entry in reader.entries.items():
        owner = stored.rpartition(".")[0].rpartition(".")[2]
        copy = names[stored] not in known and owner in leaves and entry.shape[:1] == (tables.rows,)
        own = names[stored] in tables.names
        found += own
        others = (None,) * max(0, len(entry.shape) - 1)
        if own or copy:
            edits[stored] = Edit(stored, (index, *others), (len(index), *entry.shape[1:]))
        else:
            edits[stored] = Edit(stored, (None,) * len(entry.shape), entry.shape)
    if not found:
        raise CheckpointError(
            f"the checkpoint does not contain {tables.names[0]}",
            where=str(reader.folder),
            remedy="the file is incomplete, or of another model than config.json says",
        )
    return edits


def refuse_packed_tables(
    opened: AssembledReader, edits: Mapping[str, Edit], tables: tuple[str, ...]
) -> None:
    """Refuse an embedding or a head that is stored in fewer bits.

    Raises:
        ArchitectureError: names it.
    """
    cut = {name for name, edit in edits.items() if any(kept is not None for kept in edit.kept)}
    for name, assembly in opened.made.items():
        if cut & {name, *assembly.parts.values()} or name in tables:
            raise ArchitectureError(
                f"the table is stored as {assembly.stored_as}, of which rows cannot be removed yet",
                where=name,
                remedy="expand the model first: secateur import DIR --output DENSE",
            )


def write_files(
    folder: Path, output: Path, pieces: Pieces, kept: tuple[int, ...], tables: TokenTables
) -> None:
    """Write the tokenizer and the configurations with new ids, and copy all other files."""
    new = {old: number for number, old in enumerate(kept)}
    written = {
        TOKENIZER: renumbered_tokenizer(read_tokenizer(folder), pieces, new),
        "config.json": with_own_shapes(
            renumbered_config(read_config(folder), new, tables.rows, len(kept)), tables, len(kept)
        ),
    }
    for name in (TOKENIZER_CONFIG, GENERATION):
        if (folder / name).is_file():
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            written[name] = (
                renumbered_tokenizer_config(told, new)
                if name == TOKENIZER_CONFIG
                else renumbered_config(told, new, tables.rows, len(kept))
            )
    note_links(copied_files(folder))
    for file in copied_files(folder):
        if file.name not in (*written, *LEFT_OUT, INDEX_NAME):
            shutil.copyfile(file, output / file.name)
    for name, content in written.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (output / name).write_text(text, encoding="utf-8")


def with_own_shapes(config: dict[str, Any], tables: TokenTables, count: int) -> dict[str, Any]:
    """The configuration of a model of different sizes (`models/varied.py`) with the new rows."""
    shapes = config.get("secateur_cut", {}).get("shapes", {})
    owners = {name.rpartition(".")[0] for name in tables.names} & shapes.keys()
    for owner in owners:
        shapes[owner] = [count, *shapes[owner][1:]]
    return config
