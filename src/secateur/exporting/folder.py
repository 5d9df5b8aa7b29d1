"""Everything of a model's folder except its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.exporting import ExportSource
from secateur.models.checkpoint import INDEX_NAMES, copied_files, note_links
from secateur.runs.output import cannot_write


def copy_the_rest(source: ExportSource, changes: Mapping[str, Any], output: Path) -> None:
    """Copy tokenizer, generation settings and licence, and write the configuration.

    Args:
        source: the model.
        changes: entries of `config.json` that differ from those of the source. A note that its
            weights are compressed is not copied.
        output: the folder.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    files = [f for f in copied_files(source.folder) if f.name not in ("config.json", *INDEX_NAMES)]
    note_links(files)
    kept = {k: v for k, v in source.config.items() if k != "quantization_config"}
    text = json.dumps({**kept, **changes}, indent=2, ensure_ascii=False) + "\n"
    try:
        for file in files:
            shutil.copyfile(file, output / file.name)
        (output / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(error, output) from error
