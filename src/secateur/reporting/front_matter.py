"""The YAML block at the head of a model card: what the hub reads of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.models.samples import MODELS

__all__ = ["front_matter", "inherited_front_matter", "shown_place", "source_card", "split_card"]

OURS = "secateur"
"""The tag of cards that secateur wrote."""


def front_matter(source: Mapping[str, Any], folder: Path, tags: Sequence[str]) -> str:
    """The block with its fences: base model, licence, language, library and tags.

    A base model is named where it is a model of the hub. Licence and language come from the card
    of the source. What is not known is left out.

    Args:
        source: `name` and `kind` of the model that the new one was made of, as in a manifest.
        folder: of that model.
        tags: of the new model.
    """
    from huggingface_hub import ModelCardData

    known = source_card(folder)
    sample = MODELS.get(source["name"]) if source["kind"] == "sample" else None
    base = known.get("base_model")  # of a folder that was itself made of another model
    if source["kind"] == "hub":
        base = source["name"].split("@")[0]
    elif sample is not None:
        base = sample.hub_id
    data = ModelCardData(
        base_model=base,
        license=known.get("license") or (sample.license if sample else None),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*earlier_tags(known), *tags, OURS])),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def inherited_front_matter(source: Mapping[str, Any], folder: Path) -> str:
    """The block for a model that was trained or packed: that of its source where it has one.

    Args:
        source: as for `front_matter`.
        folder: of the source.
    """
    card = folder / "README.md"
    front, _ = split_card(card.read_text(encoding="utf-8") if card.is_file() else "")
    return front if front and source["kind"] == "folder" else front_matter(source, folder, ())


def earlier_tags(card: Mapping[str, Any]) -> list[str]:
    """The tags of a card that secateur wrote; the tags of other cards are about another model."""
    tags = card.get("tags") or []
    return [*tags] if OURS in tags else []


def source_card(folder: Path) -> dict[str, Any]:
    """What the card in a folder declares; nothing if there is none, or it cannot be read."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.exists():
        return {}
    try:
        return ModelCard.load(card).data.to_dict()
    except ValueError:
        return {}


def split_card(card: str) -> tuple[str, str]:
    """The front matter of a card, with its fences, and what follows.

    Example:
        >>> from secateur.reporting.front_matter import split_card
        >>> split_card("---\\nlicense: mit\\n---\\n# A model")
        ('---\\nlicense: mit\\n---\\n', '# A model')
    """
    if card.startswith("---\n"):
        end = card.find("\n---\n", 3)
        if end > 0:
            return card[: end + 5], card[end + 5 :]
    return "", card


def shown_place(output: str | Path) -> str:
    """How a card names the folder it lies in: as it was given if that is a relative path.

    Of an absolute path only the last part is shown; the rest is about one machine.

    Example:
        >>> from secateur.reporting.front_matter import shown_place
        >>> shown_place("runs/small"), shown_place("/home/me/runs/small")
        ('runs/small', 'small')
    """
    path = Path(output)
    return path.name if path.is_absolute() or ".." in path.parts else str(path)
