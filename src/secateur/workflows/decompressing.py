"""Decompressing: a compressed checkpoint becomes a dense one that any engine loads."""

from __future__ import annotations

import json
import time
from pathlib import Path

from secateur.engine.progress import Progress, Silent
from secateur.models.checkpoint import INDEX_NAME, shard_files, shard_name
from secateur.models.shard_writer import ShardWriter
from secateur.models.sources import resolve
from secateur.models.whole_folder import whole_folder
from secateur.reporting.compression_card import source_part
from secateur.reporting.compression_report import DecompressionReport
from secateur.runtime.dense_view import DenseView
from secateur.runtime.packed import PackedCheckpoint
from secateur.workflows.carrying import (
    RUN_FOLDER,
    carry_over,
    check_free,
    check_output,
    read_config,
)

__all__ = ["decompress"]

METADATA = {"format": "pt"}


def decompress(
    model: str | Path,
    *,
    output: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DecompressionReport:
    """Write a compressed checkpoint as plain dense safetensors, zeros and all.

    What was stored losslessly comes back bit for bit; int8 comes back as the numbers it stands
    for, in the dtype that the configuration names.

    Args:
        model: folder or hub id of a compressed checkpoint, archive or not.
        output: the folder to write; it appears when everything is written.
        overwrite: replace an existing output folder.
        progress: told of every step.

    Returns:
        Sizes before and after.

    Raises:
        SecateurError: what, where, and what to do.
    """
    begun = time.perf_counter()
    source = resolve(model)
    check_output(source.folder, Path(output))
    packed = PackedCheckpoint(source.folder)
    view = DenseView(packed)
    config = read_config(source.folder)
    del config["quantization_config"]
    progress = progress or Silent()
    with whole_folder(Path(output), overwrite=overwrite) as partial:
        check_free(view.total_bytes, partial)
        write_dense(view, partial, progress)
        carry_over(source.folder, partial, config)
        (partial / RUN_FOLDER / "compression.json").unlink(missing_ok=True)
        if (partial / RUN_FOLDER).is_dir() and not any((partial / RUN_FOLDER).iterdir()):
            (partial / RUN_FOLDER).rmdir()
        card = source.folder / "README.md"
        if card.is_file():
            text = source_part(card.read_text(encoding="utf-8"))
            if text.strip():
                (partial / "README.md").write_text(text, encoding="utf-8")
        file_bytes = sum(file.stat().st_size for file in shard_files(partial))
    return DecompressionReport(
        output=Path(output),
        source_bytes=sum(file.stat().st_size for file in view.files),
        file_bytes=file_bytes,
        matrices=len(packed.layouts),
        seconds=time.perf_counter() - begun,
    )


def write_dense(view: DenseView, folder: Path, progress: Progress) -> None:
    """Write every tensor, and an index if there are several files."""
    progress.start("unpacking", len(view.entries))
    weight_map: dict[str, str] = {}
    for number, file in enumerate(view.files, start=1):
        dense = shard_name("model", number, len(view.files))
        mine = {name: e for name, e in view.entries.items() if e.file == file}
        known = {name: (entry.dtype, entry.shape) for name, entry in mine.items()}
        with ShardWriter(folder / dense, known, [], METADATA) as writer:
            for name in mine:
                writer.write(name, view.read(name))
                progress.step(note=name)
            writer.close(METADATA)
        weight_map |= dict.fromkeys(mine, dense)
    progress.finish()
    if len(view.files) > 1:
        index = {
            "metadata": {"total_size": view.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
