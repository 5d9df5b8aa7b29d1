"""The card of a compressed model: how it is stored, followed by the card of the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.reporting.front_matter import inherited_front_matter, shown_place, split_card
from secateur.reporting.results.compress import CompressResult

MARK = "<!-- the card of the dense folder -->"

TEMPLATE = """{front_matter}# {name}, compressed

The zeros of this model are not stored. Made by `secateur compress`; `docs/format.md` of secateur
specifies the files.

| | bytes | of dense bfloat16 |
|---|---:|---:|
| weight files | {file_bytes:,} | {ratio:.1%} |
| prunable matrices, {sparsity:.2%} zeros | {linear_bytes:,} | {linear_ratio:.1%} |

| stored as | matrices | bits per weight |
|---|---:|---:|
{formats}

## Use

```python
import secateur
model = secateur.load("{place}")
```

For engines that do not know of this format: `secateur decompress {place} --output {place}-dense`.

The card of the dense folder follows; what it says of sizes and of loading is about that folder.

{mark}
{body}"""


def compression_card(
    report: CompressResult, source: Mapping[str, Any], source_folder: Path, output: str | Path
) -> str:
    """The text of README.md for the output folder.

    Args:
        report: the result of the compression.
        source: name and kind of the source.
        source_folder: the source checkpoint; its card is appended.
        output: the output folder.
    """
    card = source_folder / "README.md"
    _, body = split_card(card.read_text(encoding="utf-8") if card.is_file() else "")
    stored = {**report.formats}
    if report.embeddings.matrices:
        stored["embeddings and head, int8"] = report.embeddings
    return TEMPLATE.format(
        front_matter=inherited_front_matter(source, source_folder),
        place=shown_place(output),
        name=Path(source["name"]).name,
        file_bytes=report.file_bytes,
        ratio=report.ratio,
        sparsity=report.sparsity,
        linear_bytes=report.linears.bytes,
        linear_ratio=report.linears.of_bfloat16,
        formats="\n".join(
            f"| {kind} | {x.matrices} | {x.bits_per_weight:.2f} |" for kind, x in stored.items()
        ),
        mark=MARK,
        body=body,
    )


def source_part(card: str) -> str:
    """The card of the dense model, taken from the card of a compressed one."""
    front, body = split_card(card)
    _, found, dense = body.partition(MARK + "\n")
    return front + dense if found else card


def with_dense_card(card: str, dense: str) -> str:
    """Replace the card of the dense model within the card of a compressed one."""
    _, body = split_card(card)
    head, found, _ = body.partition(MARK + "\n")
    if not found:
        return dense
    front, dense_body = split_card(dense)
    return front + head + found + dense_body
