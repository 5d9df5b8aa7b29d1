"""The card of an imported model: where it came from, its zeros, then the card of its source."""

from __future__ import annotations

from pathlib import Path

from secateur.reporting.front_matter import front_matter, shown_place, source_name, split_card
from secateur.reporting.results.export import ImportResult

TEMPLATE = """{front_matter}# {name}, imported

Made by `secateur import` from a folder that another tool wrote. The zeros were counted in these
files.

| | |
|---|---|
{facts}

Each matrix is listed in `secateur/import.json`.{packing}

{body}"""

PACKING = """ The zeros are stored as zeros; `secateur compress {place} --output
{place}-small` stores the model without them."""


def import_card(result: ImportResult, source_folder: Path, output: str | Path) -> str:
    """The text of README.md for the output folder.

    Args:
        result: what was imported.
        source_folder: the source; its card is appended.
        output: the folder of the model.
    """
    card = source_folder / "README.md"
    _, body = split_card(card.read_text(encoding="utf-8") if card.is_file() else "")
    source = result.record.source
    facts = [("source", f"`{source_name(source.model_dump())}`"), *result.facts()]
    packing = PACKING if result.sparsity else ""
    return TEMPLATE.format(
        front_matter=front_matter(source.model_dump(), source_folder, ["pruned", "sparse"]),
        name=Path(source.name.partition("@")[0]).name,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts),
        packing=packing.format(place=shown_place(output)),
        body=body,
    )
