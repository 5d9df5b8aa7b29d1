"""Copies of a checkpoint that receive new weights, for every form at rest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.models.at_rest import AssembledReader, view_in
from secateur.models.checkpoint import (
    INDEX_NAME,
    INDEX_NAMES,
    PLAIN,
    CheckpointReader,
    PatchedCopy,
    ShardWriter,
    copied_files,
    note_links,
    read_entry,
    shard_name,
)
from secateur.progress import Progress, Silent
from secateur.runs.output import cannot_write

OF_A_FORM = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
LEFT_OUT = ("config.json", *INDEX_NAMES, *OF_A_FORM)
"""Files of a source that describe the form of its weights, and do not fit its dense copy."""


def copy_of(reader: CheckpointReader, folder: Path, *, keep_format: bool = False) -> PatchedCopy:
    """The copy for a source: in place for plain tensors, else dense or, on demand, in its form."""
    if not isinstance(reader, AssembledReader):
        return PatchedCopy(reader, folder)
    return StoredCopy(reader, folder) if keep_format else ExpandedCopy(reader, folder)


def weight_bytes_of(reader: CheckpointReader, *, keep_format: bool = False) -> int:
    """The size of the weight files of a copy."""
    if isinstance(reader, AssembledReader) and not keep_format:
        return reader.total_bytes
    return sum(file.stat().st_size for file in reader.files)


class ExpandedCopy(PatchedCopy):
    """A copy whose tensors are dense: the form of the source and its configuration are gone."""

    source: AssembledReader

    def __init__(self, source: AssembledReader, folder: Path) -> None:
        super().__init__(source, folder)
        self._written: CheckpointReader | None = None

    def create(self, progress: Progress | None = None) -> None:
        """Write all tensors dense, and copy the other files. Replaces files of the same names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        others = [f for f in copied_files(self.source.folder) if f.name not in LEFT_OUT]
        note_links(others)
        try:
            for file in others:
                target = self.folder / file.name
                target.unlink(missing_ok=True)
                shutil.copyfile(file, target)
            config = json.dumps(self.source.config, indent=2, ensure_ascii=False) + "\n"
            (self.folder / "config.json").write_text(config, encoding="utf-8")
        except OSError as error:
            raise cannot_write(error, self.folder) from error
        write_dense(self.source.unsplit(), self.folder, progress or Silent())
        self._dirty |= {self.folder / "config.json", *self.folder.glob("*.safetensors")}

    @property
    def target(self) -> CheckpointReader:
        """The copy, as it shows the tensors of the source."""
        if self._written is None:
            self._written = CheckpointReader(self.folder)
            for name, parts in self.source.splits.items():
                if name in self._written.entries:
                    self._written.split(name, parts)
        return self._written

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor; see `PatchedCopy.write`."""
        PatchedCopy(self.target, self.folder).write(name, tensor)
        self._dirty.add(self.folder / self.target.entries[name].file.name)


class StoredCopy(PatchedCopy):
    """A copy in the form of the source: new values are rounded to the stored scales.

    Zeros stay zeros, and numbers that did not change keep their bytes.
    """

    source: AssembledReader

    def __init__(self, source: AssembledReader, folder: Path) -> None:
        super().__init__(source, folder)
        fixed = [name for name, one in source.made.items() if one.back is None]
        if fixed:
            raise RecipeError(
                f"{len(fixed)} matrices are stored as {source.made[fixed[0]].stored_as}, which "
                "cannot take new values",
                where=fixed[0],
                remedy="leave out --keep-format: the result is then written in "
                f"{str(source.made[fixed[0]].dtype).removeprefix('torch.')}",
            )
        self.raw = PatchedCopy(source.stored, folder)

    def create(self, progress: Progress | None = None) -> None:
        """Copy all files; see `PatchedCopy.create`."""
        self.raw.create(progress)

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor in its form; it is cast to the dtype of the model first."""
        owner = self.source.owner.get(name, name)
        if owner not in self.source.made:
            self.raw.write(name, tensor)
            return
        assembly = self.source.made[owner]
        entry = self.source.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"{name}: shape {tuple(tensor.shape)} where {entry.shape} is shown",
                where=str(entry.file),
            )
        parts = {role: self.stored_now(part) for role, part in assembly.parts.items()}
        values = tensor.detach().to("cpu", assembly.dtype)
        if owner != name:
            whole = assembly.make(parts).to(assembly.dtype).contiguous()
            view_in(whole, entry).copy_(values)
            values = whole
        assert assembly.back is not None
        for role, part in assembly.back(values, parts).items():
            if not torch.equal(bytes_of(part), bytes_of(parts[role])):
                self.raw.write(assembly.parts[role], part)

    def stored_now(self, part: str) -> Tensor:
        """A part as it is in the copy."""
        entry = self.source.stored.entries[part]
        return read_entry(replace(entry, file=self.folder / entry.file.name))

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        self.raw.sync()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, since not every dtype can be compared."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def write_dense(view: CheckpointReader, folder: Path, progress: Progress) -> None:
    """Write every tensor that a reader shows, and an index if there are several files."""
    progress.start("writing tensors", len(view.entries))
    weight_map: dict[str, str] = {}
    for number, file in enumerate(view.files, start=1):
        dense = shard_name("model", number, len(view.files))
        mine = {name: e for name, e in view.entries.items() if e.file == file}
        known = {name: (entry.dtype, entry.shape) for name, entry in mine.items()}
        with ShardWriter(folder / dense, known, [], PLAIN) as writer:
            for name in mine:
                writer.write(name, view.read(name))
                progress.step(note=name)
            writer.close(PLAIN)
        weight_map |= dict.fromkeys(mine, dense)
    progress.finish()
    if len(view.files) > 1:
        index = {
            "metadata": {"total_size": view.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
