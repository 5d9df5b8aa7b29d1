"""The card of a compressed model: what is stored how, before the card of the model itself."""

from __future__ import annotations

from pathlib import Path

from secateur.reporting.results.compress import CompressResult

__all__ = ["compression_card", "source_part", "split_card", "with_dense_card"]

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
model = secateur.load("DIR")
```

For engines that do not know of this format: `secateur decompress DIR --output DENSE`.

The card of the dense folder follows; what it says of sizes and of loading is about that folder.

{mark}
{body}"""


def compression_card(report: CompressResult, name: str, source_folder: Path) -> str:
    """The text of README.md for the folder written.

    Args:
        report: of the compression.
        name: what the user called the source.
        source_folder: the source checkpoint, for its own card.
    """
    card = source_folder / "README.md"
    front, body = split_card(card.read_text(encoding="utf-8") if card.is_file() else "")
    stored = {**report.formats}
    if report.embeddings.matrices:
        stored["embeddings and head, int8"] = report.embeddings
    return TEMPLATE.format(
        front_matter=front,
        name=name,
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


def split_card(card: str) -> tuple[str, str]:
    """The front matter of a card, with its fences, and what follows."""
    if card.startswith("---\n"):
        end = card.find("\n---\n", 3)
        if end > 0:
            return card[: end + 5], card[end + 5 :]
    return "", card


def source_part(card: str) -> str:
    """The card of the dense folder, out of that of a compressed one."""
    front, body = split_card(card)
    _, found, dense = body.partition(MARK + "\n")
    return front + dense if found else card


def with_dense_card(card: str, dense: str) -> str:
    """The card of a compressed model with another card of its dense folder."""
    _, body = split_card(card)
    head, found, _ = body.partition(MARK + "\n")
    if not found:
        return dense
    front, dense_body = split_card(dense)
    return front + head + found + dense_body
